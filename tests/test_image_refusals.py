"""What cannot be trained on pictures is refused in words, before anything is written; what can be is trained as it is."""

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("PIL")

import torch
from PIL import Image

import shira
from conftest import all_bits, same_bits
from pipelines import pipe_adapter, sd3, sdxl, stable_diffusion
from shira import DataError, SwitchError
from shira.data.pictures import Picture, image_of, pictures_in
from shira.integrations import diffusers_training
from shira.integrations.diffusers_sampling import modules_of, sample
from shira.runs.image_recipes import ImageRecipe, train_image

LINE = "train-image pipeline --data dog --steps 1 --batch-size 1 --sample-steps 1"


def recipe(**more):
    return ImageRecipe(**({"pipeline": "-", "data": "dog", "steps": 2, "batch_size": 1, "sample_steps": 1} | more))


def test_pictures_of_the_class_are_not_made_among_those_that_train(run, folder):
    before = sorted((folder / "dog").iterdir())
    for place in ("dog", "./one/../dog"):
        code, _, err = run(f"{LINE} --class-prompt dog --class-data {place}")
        assert code == 1 and f"--class-data must be another folder than data, found {place} for both" in " ".join(err.split())
    with pytest.raises(DataError, match="class_data must be another folder than data"):
        train_image(recipe(class_prompt="dog", class_data=str(folder / "dog")), stable_diffusion())
    assert sorted((folder / "dog").iterdir()) == before


def test_hidden_files_are_no_pictures(folder):
    (folder / "dog" / "._red.png").write_bytes(b"\0\5\x16\7")
    assert [picture.image.name for picture in pictures_in("dog")] == ["blue.png", "red.png"]
    (folder / "hidden").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "hidden" / ".a.png")
    with pytest.raises(DataError, match="hidden holds no picture"):
        pictures_in("hidden", "dog")


def test_a_pipeline_that_cannot_be_trained_as_it_is(folder):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "q_proj"], init_lora_weights=False)

    def without(part, make=stable_diffusion):
        pipe = make()
        setattr(pipe, part, None)
        return pipe

    lora, on_text, offloaded, fused = (stable_diffusion() for _ in range(4))
    lora.unet.add_adapter(config, "style")
    on_text.text_encoder.add_adapter(config, "style")
    offloaded.enable_sequential_cpu_offload(device="cpu")
    fused.fuse_qkv_projections()
    for pipe, error, words in (
        (lora, DataError, r"the pipeline holds a LoRA, found in 'unet\..*; call pipe.unload_lora_weights\(\) first"),
        (on_text, DataError, "holds a LoRA, found in 'text_encoder"),
        (offloaded, SwitchError, "accelerate keeps weights of pipe.unet outside of it"),
        (fused, SwitchError, r"call pipe.unet.unfuse_qkv_projections\(\) first"),
        (without("text_encoder"), DataError, "StableDiffusionPipeline has no text_encoder; it cannot be trained; load the"),
        (without("tokenizer"), DataError, "has no tokenizer; it cannot be trained"),
        (without("vae"), DataError, "has no vae; it cannot be trained"),
        (without("tokenizer_2", sdxl), DataError, "has no tokenizer_2; it cannot be trained"),
        (without("text_encoder", sdxl), DataError, "has no text_encoder; it cannot be trained"),
        (without("text_encoder_2", sd3), DataError, "has no text_encoder_2; it cannot be trained"),
    ):
        before = None if pipe is offloaded else all_bits(modules_of(pipe))  # there the weights are on the meta device
        with pytest.raises(error, match=words):
            train_image(recipe(train_text_encoder=pipe is on_text), pipe)
        assert before is None or same_bits(before, all_bits(modules_of(pipe)))


def test_a_text_encoder_that_its_pipeline_may_lack(folder):
    pipe = sd3()
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    assert train_image(recipe(), pipe).tensors


@pytest.mark.filterwarnings("ignore")  # torch's tracer warns of what it does itself
def test_a_compiled_denoiser_trains_and_a_compiled_block_is_refused(folder):
    def trained(pipe):
        shown = {}
        on_sample = lambda title, prompts, images: shown.update({title: [image.tobytes() for image in images]})  # noqa: E731
        before = all_bits(modules_of(pipe))
        adapter = train_image(recipe(), pipe, on_sample=on_sample)
        assert same_bits(before, all_bits(modules_of(pipe)))
        return adapter, shown

    plain, whole, block = (stable_diffusion() for _ in range(3))
    wanted, pictures = trained(plain)
    whole.unet = torch.compile(whole.unet, backend="eager")
    found, shown = trained(whole)
    assert found.fingerprints == wanted.fingerprints and shown.keys() == pictures.keys() and shown["base"] == pictures["base"]
    assert all(torch.equal(tensor.values, wanted.tensors[name].values) for name, tensor in found.tensors.items())
    block.unet.mid_block = torch.compile(block.unet.mid_block, backend="eager")
    with pytest.raises(DataError, match="pipe.unet.mid_block is compiled, .*train it plain, pipe.unet.mid_block._orig_mod"):
        train_image(recipe(), block)


def test_text_encoders_that_do_not_train(run, folder):
    pipe = stable_diffusion()
    pipe.save_pretrained("pipeline")
    both = pipe_adapter(pipe, 1)
    both.save("both.safetensors")
    text = {name: tensor for name, tensor in both.tensors.items() if name.startswith("text_encoder.")}
    shira.Adapter(text).save("text.safetensors")
    code, _, err = run(f"{LINE} --start both.safetensors -o more.safetensors")
    said = "both.safetensors changes text_encoder, which does not train here; give --train-text-encoder"
    assert code == 1 and said in " ".join(err.split()), err
    line = f"{LINE} --density 0.1 --avoid both.safetensors --avoid text.safetensors"
    assert run(f"{line} -o one.safetensors")[0] == 0
    one = shira.load("one.safetensors")
    assert one.metadata["mask"]["avoid"] == ["random1"]
    for name, tensor in one.tensors.items():
        if name in both.tensors:
            assert not torch.isin(tensor.indices, both.tensors[name].indices).any()


def test_checkpoints_of_a_run_that_was_stopped_are_told(run, folder):
    stable_diffusion().save_pretrained("pipeline")
    (folder / "style.checkpoints").mkdir()
    code, out, err = run(f"{LINE} -o style.safetensors")
    assert code == 0 and "style.checkpoints is of a run that was stopped; --save-every goes on" in " ".join(out.split()), err


def test_pictures_with_broken_exif_are_read_upright(folder):
    data = Image.Exif()
    data[0x0112], data[0x010F] = 6, "maker"
    image = Image.new("RGB", (4, 2), "red")
    image.paste("blue", (0, 0, 2, 2))
    image.save("turned.jpg", exif=data, quality=100)
    whole = (folder / "turned.jpg").read_bytes()
    (folder / "broken.jpg").write_bytes(whole.replace(b"\x01\x0f\x00\x02", b"\x01\x1a\x00\x02"))  # a text as resolution
    (upright, broken) = (image_of(Picture(name, "")) for name in ("turned.jpg", "broken.jpg"))
    assert upright.size == (2, 4) and upright.getpixel((0, 0))[2] > 200
    assert broken.size == (2, 4) and broken.tobytes() == upright.tobytes()


def test_half_of_a_character_in_a_caption(run, folder):
    (folder / "dog/metadata.jsonl").write_text('{"file_name": "red.png", "text": "a \\ud83e"}')
    with pytest.raises(DataError, match=r"metadata\.jsonl, line 1: 'text' must be valid Unicode, found 'a .*ud83e'"):
        pictures_in("dog")
    with pytest.raises(DataError, match="the prompt must be valid Unicode"):
        pictures_in("dog", "a \udcff")
    code, _, err = run("sample --pipe pipeline -p \udcff")
    assert code == 1 and "--prompt must be valid Unicode" in err


def test_a_folder_for_pictures_of_the_class(run, folder, monkeypatch):
    code, _, err = run(f"{LINE} --class-prompt dog --class-data dog/red.png")
    assert code == 1 and "--class-data must be a folder of pictures, found the file dog/red.png" in " ".join(err.split())
    (folder / "made").mkdir()
    (folder / "made/.DS_Store").touch()  # as macOS writes it into empty folders

    def drawn(pipe, prompt, seed, **options):
        return Image.new("RGB", (8, 8), "white" if seed % 3 == 0 else "black")

    monkeypatch.setattr(diffusers_training, "sample", drawn)
    found = diffusers_training.class_pictures(None, "dog", "made", 3)  # black ones are what a safety checker leaves
    assert [picture.image.name for picture in found] == ["class-00000.png", "class-00003.png", "class-00006.png"]
    monkeypatch.setattr(diffusers_training, "sample", lambda *_, **__: Image.new("RGB", (8, 8)))
    with pytest.raises(DataError, match="6 pictures of 'cat' are black, by the pipeline's safety checker"):
        diffusers_training.class_pictures(None, "cat", None, 3)


def test_a_grid_that_could_not_be_written_is_found_before_it_is_drawn(run, folder):
    (folder / "grid.png").mkdir()
    code, _, err = run("sample --pipe pipeline -p x")
    assert code == 1 and "grid.png is a folder; give the name of a file, grid.png/grid.png" in " ".join(err.split())
    code, _, err = run("sample --pipe pipeline -p x -o other.png --guidance inf")
    assert code == 1 and "--guidance must be a finite number, found inf" in err


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_training_where_gradients_are_turned_off_is_training(folder, without_gradients):
    wanted, pipe = train_image(recipe(), stable_diffusion()), stable_diffusion()
    with without_gradients():
        adapter = train_image(recipe(), pipe)
    assert all(torch.equal(each.values, wanted.tensors[name].values) for name, each in adapter.tensors.items())
    assert same_bits(all_bits(modules_of(pipe)), all_bits(modules_of(stable_diffusion())))


def test_a_pipeline_of_several_dtypes_draws_nothing():
    pipe = stable_diffusion()
    pipe.vae.to(torch.bfloat16)
    with pytest.raises(DataError, match=r"several dtypes: vae bfloat16, text_encoder float32, unet float32 .*pipe.to"):
        sample(pipe, "dog", 0, steps=1)
