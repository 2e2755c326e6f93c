"""A served tiny model for the tests of the Transformers engine, and what single runs of the same model write."""

import asyncio
import contextlib
import threading

import torch

import shira
from conftest import all_bits, letter_tokenizer, random_adapter, same_bits

SELECTIONS = {"base": None, "a": "a", "b": "b", "a:0.5+b": {"a": 0.5, "b": 1.0}}


def tiny_llama(seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=97, num_key_value_heads=2, max_position_embeddings=96, pad_token_id=0, **sizes)
    return LlamaForCausalLM(config).eval()


class Served:
    """An engine over a tiny model with two adapters, its application, and an oracle.

    made: (model, seed) -> an adapter. mix: see `Settings`; held: of `Mixing`.
    """

    def __init__(
        self, folder, tokenizer=None, model=None, ends=(), app_options=None, made=random_adapter, mix=0, held=8, **options
    ):
        from shira.serving.catalogue import Catalogue
        from shira.serving.mixing import Mixing
        from shira.serving.resident import Resident
        from shira.serving.transformers_engine import TransformersEngine

        self.folder, self.model = folder, tiny_llama() if model is None else model
        self.before = all_bits(self.model)
        for seed, name in enumerate("ab"):
            made(self.model, seed).save(folder / f"{name}.safetensors")
        self.catalogue = Catalogue(folder, ["base"])
        for name in "ab":
            self.catalogue.load(name)  # it waits until the file has settled; `scan` leaves it for the next time
        self.oracle = shira.Switcher(self.model)
        for name in "ab":
            self.oracle.add(name, folder / f"{name}.safetensors")
        self.tokenizer = letter_tokenizer() if tokenizer is None else tokenizer
        self.resident = Resident(self.model, folder)
        self.mixing = Mixing(self.model, self.resident, mix, held) if mix else None
        self.engine = TransformersEngine(self.model, self.resident, ends=ends, mixing=self.mixing, **options)
        self._app_options = app_options or {}
        self._computed = self._computes()

    def single(self, text, prompt, tokens, **options):
        """What Transformers' `generate` writes with this selection alone."""
        prompt_ids = torch.tensor([prompt])
        with self.oracle.using(SELECTIONS[text]):
            written = self.model.generate(
                prompt_ids,
                attention_mask=torch.ones_like(prompt_ids),
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=options.pop("eos_token_id", None),
                pad_token_id=0,
                **options,
            )
        return written[0, len(prompt) :].tolist()

    def key(self, text):
        return self.catalogue.resolve(text).key

    def intact(self):
        return same_bits(self.before, all_bits(self.model))

    def run(self, work):
        """Run an asynchronous function while the engine runs; then the base must be back, bit for bit."""

        async def whole():
            self.engine.start()
            try:
                return await asyncio.wait_for(work(), 60)
            finally:
                await self.engine.stop(0)

        result = asyncio.run(whole())
        assert self.intact() and torch.equal(self._computes(), self._computed)
        return result

    def _computes(self):
        """What the model computes, as it is now."""
        with torch.no_grad():
            return self.model(torch.tensor([[3, 4, 5]])).logits

    def app(self):
        from shira.serving.settings import Settings
        from shira.serving.transformers_server import app

        settings = Settings(model="base", adapters=str(self.folder), **self._app_options)
        return app(self.engine, self.catalogue, self.tokenizer, settings, {})

    def http(self, work):
        """Run `work(client)` with OpenAI's own client, in this process."""
        import httpx2
        import openai

        async def whole():
            made = self.app()
            async with made.router.lifespan_context(made):
                transport = httpx2.ASGITransport(made)
                async with httpx2.AsyncClient(transport=transport) as plain:
                    client = openai.AsyncOpenAI(
                        base_url="http://shira/v1", api_key="none", http_client=plain, max_retries=0, timeout=30
                    )
                    return await asyncio.wait_for(work(client), 60)

        result = asyncio.run(whole())
        assert self.intact()
        return result

    @contextlib.contextmanager
    def listening(self):
        """A real server on loopback; gives its address and the server."""
        import uvicorn

        server = uvicorn.Server(uvicorn.Config(self.app(), host="127.0.0.1", port=0, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started and thread.is_alive():
                threading.Event().wait(0.01)
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", server
        finally:
            server.should_exit = True
            thread.join(30)
        assert self.intact()


def prompts(count, seed=1, longest=30):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest, (count,), generator=generator).tolist()
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]


async def written(job):
    """All tokens of a job."""
    return [token async for update in job for token in update.tokens]
