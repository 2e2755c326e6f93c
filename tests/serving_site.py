"""An application with the gate and the routes about adapters, over the weights of a small model."""

import asyncio

import httpx2
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from conftest import all_bits, mlp, random_adapter
from shira.serving.adapter_routes import AdapterRoutes, watching
from shira.serving.catalogue import Catalogue
from shira.serving.gate import Gate, Keys
from shira.serving.metrics import Metrics
from shira.serving.resident import Resident
from shira.serving.settings import Settings


class WeightsAlone:
    """An engine that holds the weights of a model and runs no steps."""

    def __init__(self, resident):
        self.resident = resident
        self.works = True

    async def prefetch(self, key):
        self.resident.prefetch(key)

    async def pin(self, key, pinned):
        self.resident.pin(key, pinned)

    async def tiers(self):
        return self.resident.tiers()

    async def alive(self):
        return self.works


class Site:
    """An application with the gate and the routes, and one route that answers slowly, as a model does."""

    def __init__(self, folder, keys=None, **options):
        self.model, self.folder = mlp(), folder
        self.before = all_bits(self.model)
        for seed, name in enumerate(["coder", "poet"], start=1):
            random_adapter(self.model, seed).save(folder / f"{name}.safetensors")
        self.catalogue = Catalogue(folder, ["base", "alias"])
        self.engine = WeightsAlone(Resident(self.model, folder, ready=2))
        self.metrics = Metrics()
        self.settings = Settings(model="m", adapters=str(folder), scan=0.01, **options)
        self.app = FastAPI()
        self.app.include_router(AdapterRoutes(self.catalogue, self.engine, self.metrics).router)
        self.app.add_api_route("/v1/completions", self.slowly, methods=["POST"], response_model=None)
        self.app.add_middleware(Gate, settings=self.settings, keys=keys or Keys(), metrics=self.metrics)

    async def slowly(self, request: Request):
        wanted = await request.json()
        if "stream" not in wanted:
            await asyncio.sleep(wanted.get("seconds", 0))
            return JSONResponse({"said": wanted})

        async def parts():
            yield b"data: 1\n\n"
            await asyncio.sleep(wanted["seconds"])
            yield b"data: 2\n\n"

        return StreamingResponse(parts(), media_type="text/event-stream")

    def run(self, work):
        async def whole():
            transport = httpx2.ASGITransport(self.app)
            async with (
                watching(self.catalogue, self.settings.scan),
                httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client,
            ):
                return await asyncio.wait_for(work(client), 30)

        return asyncio.run(whole())


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)
