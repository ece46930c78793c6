"""examples/wan_finetune.py on a tiny random checkpoint: offline, through the real loading code of diffusers."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sla_compile
from examples import wan_finetune
from examples.wan import clips, generating
from examples.wan.clips import Clip, clips_in, read_frames
from examples.wan.draws import Draws, even, shifted
from examples.wan.encoding import Cache, VideoSize
from examples.wan.levels import Levels
from examples.wan.student import Student, load_result, settings_of
from examples.wan.training import Training
from tests.support.closeness import assert_close
from tests.support.tiny_wan import CAPTIONS, save_clips, save_tiny_wan

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

SIZE = VideoSize(frames=9, height=64, width=96, fps=16.0)
SMALL = ["--frames", "9", "--height", "64", "--width", "96", "--inner", "eager", "--min-tokens", "0", "--block", "16"]
STUDENT = [*SMALL, "--topk", "0.25", "--max-topk", "0.75", "--rank", "2"]
SHORT = ["--steps", "4", "--save-every", "1", "--fit", "2", "--levels", "2", "--measure", "2", "--orders", "none"]
SAMPLED = ["--samples", "1", "--sampling-steps", "1", "--validate-every", "3", "--guidance", "1"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch_dtype:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Killed(BaseException):
    """Ends a run as a signal would, but in this process: importing everything again takes longer than the test."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint ``wan`` and videos ``clips``."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_wan(folder / "wan")
    save_clips(folder / "clips")
    return folder


def train(tiny: Path, run: Path, *more: str) -> None:
    torch.compiler.reset()
    torch.manual_seed(torch.seed() % 2**31)  # as in another process: nothing may follow from it
    data = ["--checkpoint", str(tiny / "wan"), "--videos", str(tiny / "clips"), "--run", str(run)]
    wan_finetune.main(["train", *data, *STUDENT, *SHORT, *more])


@pytest.fixture(scope="module")
def whole(tiny: Path) -> Iterator[Path]:
    """A run that nothing interrupted."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train(tiny, tiny / "whole", "--orders", "head", *SAMPLED)
    (tiny / "whole/printed.txt").write_text(printed.getvalue())
    yield tiny / "whole"
    torch.compiler.reset()


def test_a_run_leaves_what_it_promises(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads((whole / "report.json").read_text())
    assert list(report) == ["dense", "switched", "calibrated", "trained"]
    assert report["dense"]["error"] == 0 < report["trained"]["error"] < 1
    assert {"ms", "loss"} <= set(report["dense"]) & set(report["calibrated"])
    assert report["trained"]["training_step_ms"] > 0
    names = {path.name for path in (whole / "validation").iterdir() if path.suffix in (".gif", ".mp4")}
    assert {name.rpartition(".")[0] for name in names} == {"step-0-0", "step-3-0", "result-0"}
    lora = load_file(whole / "result/pytorch_lora_weights.safetensors")
    assert len(lora) == 2 * 2 * 4  # A and B of the four layers of each of two attentions
    assert all(value.any() for name, value in lora.items() if "lora_B" in name)
    assert len(load_file(whole / "result/sla_gates.safetensors")) == 2  # shift and topks
    assert "1 attention(s), 6 order(s), 2 batch(es): output error" in " ".join(
        (whole / "printed.txt").read_text().split()
    )
    train(whole.parent, whole, "--orders", "head", *SAMPLED, "--save-every", "2")  # nothing is left to do
    printed = " ".join(capsys.readouterr().out.split())
    assert "SLA, fine-tuned" in printed
    assert f"python examples/wan_finetune.py generate --run {whole}" in printed
    assert "fine-tuning" not in printed


def test_it_goes_on_after_a_kill(tiny: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step behind the last checkpoint, which is then done again; the result is the same to the last bit."""
    update, run, calls = Training._update, tmp_path / "run", []

    def killed(self: Training, step: int) -> Any:
        if step == 3:
            raise Killed
        with sla_compile.RunCounters(self.student.model) as counters:
            loss = update(self, step)
            calls.append([site["calls"] for site in counters.read().values()])
        return loss

    more = ["--samples", "0", "--save-every", "2"]
    for stage in ("cache", "dense", "fitted"):  # what is done already is left alone; see test_other_forms for all of it
        shutil.copytree(whole / stage, run / stage)
    with monkeypatch.context() as patched:
        patched.setattr(Training, "_update", killed)
        with pytest.raises(Killed):
            train(tiny, run, *more)
    assert calls == [[2], [2], [2]]  # forward and recomputation; the teacher's attention is dense
    assert torch.load(run / "running.pt", weights_only=True)["step"] == 2
    assert not (run / "result").exists()
    train(tiny, run, *more)
    for name in ("pytorch_lora_weights.safetensors", "sla_gates.safetensors"):
        ours, theirs = load_file(run / "result" / name), load_file(whole / "result" / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = (json.loads((path / "report.json").read_text())["trained"] for path in (run, whole))
    assert all(ours[name] == theirs[name] for name in ("loss", "error"))


def test_latents_and_text_are_the_pipelines(tiny: Path, whole: Path) -> None:
    pipe = diffusers.WanPipeline.from_pretrained(tiny / "wan")
    clip = clips_in(tiny / "clips")[2]
    assert clip == Clip(tiny / "clips/clip2.gif", CAPTIONS[2])
    cache = Cache(whole / "cache", str(tiny / "wan"), SIZE)
    with torch.no_grad():
        text, empty = pipe.encode_prompt(CAPTIONS[2], "", max_sequence_length=512)
        frames = read_frames(clip.path, 9, (64, 96), 16)
        assert frames is not None
        raw = pipe.vae.encode(frames[None]).latent_dist.mode()
    assert_close("text", cache.text(CAPTIONS[2]), text[0], 1e-6)
    assert_close("no text", cache.text(""), empty[0], 1e-6)
    latents = cache.latents(clip)[None]
    assert latents.shape == (1, 16, 3, 8, 12)
    mean, std = (
        torch.tensor(values).view(1, 16, 1, 1, 1)
        for values in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    assert_close("latents", latents * std + mean, raw, 1e-5)  # as the pipeline takes them back before it decodes


def test_captions_are_found(tmp_path: Path) -> None:
    """In either table, by any of the names of its columns, also of videos in folders below; --caption for the rest."""
    (tmp_path / "below").mkdir()
    for name in ("one.mp4", "below/two.MOV", "three.gif", "notes.pdf"):
        (tmp_path / name).touch()
    rows = [{"video": "below/two.MOV", "text": "two"}, {"file_name": "three.gif", "caption": "three"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = {clip.path.name: clip.caption for clip in clips_in(tmp_path, "another")}
    assert found == {"one.mp4": "another", "two.MOV": "two", "three.gif": "three"}
    (tmp_path / "metadata.csv").write_text("path,prompt\n,lost\n")
    with pytest.raises(ValueError, match=r"metadata\.csv: row 1 has no file; accepted: a column file_name"):
        clips_in(tmp_path, "another")


def test_frames_are_taken_by_their_times(tiny: Path) -> None:
    """As many a second as asked for, scaled and cropped to the middle; None of a video that is too short."""
    path = tiny / "clips/clip0.gif"
    every, half = read_frames(path, 9, (70, 100), 16), read_frames(path, 5, (70, 100), 8)
    assert every is not None
    assert half is not None
    assert torch.equal(half, every[:, ::2])
    assert (every[0, 0, 10:30, 5:25] > 0.9).all()  # the ball
    assert (every[:, :, 60:] == -1).all()
    crop = read_frames(path, 9, (70, 50), 16)
    assert crop is not None
    assert torch.equal(crop, every[..., 25:75])
    assert read_frames(path, 10, (70, 100), 16) is None


def generated(run: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> tuple[np.ndarray, Any]:
    """The video that ``generate`` writes, and the transformer it came from."""
    kept: list[Any] = []
    from_pretrained = diffusers.WanPipeline.from_pretrained

    def keep(*args: Any, **kwargs: Any) -> Any:
        kept.append(from_pretrained(*args, **kwargs))
        return kept[-1]

    monkeypatch.setattr(diffusers.WanPipeline, "from_pretrained", keep)
    monkeypatch.setattr(generating, "save_video", lambda video, *_: kept.append(video))
    few = ["--prompt", CAPTIONS[0], "--sampling-steps", "2", "--guidance", "1", "--seed", "3"]
    torch.compiler.reset()
    wan_finetune.main(["generate", "--run", str(run), *few, *more])
    return kept[1], kept[0].transformer


def test_generate(tiny: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the result its attentions are sparse-linear; --dense gives the checkpoint's own video."""
    with monkeypatch.context() as patched:
        video, transformer = generated(whole, patched)
    assert video.shape == (9, 64, 96, 3)
    assert sla_compile.report(transformer).totals.rewritten == 1
    assert any("lora" in name for name, _ in transformer.named_parameters())
    with monkeypatch.context() as patched:
        dense, _ = generated(whole, patched, "--dense")
    pipe = diffusers.WanPipeline.from_pretrained(tiny / "wan")
    size = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 1.0}
    expected = pipe(prompt=CAPTIONS[0], generator=torch.Generator().manual_seed(3), **size).frames[0]
    np.testing.assert_allclose(dense, expected, atol=1e-5)
    assert np.abs(video - dense).max() > 1e-5


def test_each_call_has_the_topks_of_its_level(tiny: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the plan beside the gates has them, at the sampler's shifted times; and with more blocks where it says so."""
    kept = json.loads((whole / "result/levels.json").read_text())
    plan = sla_compile.SparsityPlan.from_json(json.dumps(kept["plan"]))
    assert [level.time for level in plan.levels] == [0.25, 0.75]
    assert kept["shift"] == 3.0  # of the checkpoint's sampler
    pipe = diffusers.WanPipeline.from_pretrained(tiny / "wan")
    load_result(pipe, whole / "result", inner="eager")
    gate = next(iter(sla_compile.gates(pipe.transformer).values()))
    other = dataclasses.replace(plan.levels[1], topks=dict.fromkeys(plan.levels[1].topks, (0.75, 0.5)))
    Levels(dataclasses.replace(plan, levels=(plan.levels[0], other)), 3.0).follow(pipe.transformer)
    arguments = {"hidden_states": torch.randn(1, 16, 3, 8, 12), "encoder_hidden_states": torch.randn(1, 512, 32)}
    found = []
    for even_time in (0.1, 0.49, 0.51, 0.9):
        time = shifted(torch.tensor([even_time]), 3.0)
        assert_close("time", even(time, 3.0), torch.tensor([even_time]), 1e-6)
        with torch.no_grad():
            pipe.transformer(timestep=1000 * time, **arguments)
        assert gate.sparsity is not None
        found.append(tuple((gate.sparsity[:, 0] / 1e6).tolist()))
    (first,) = plan.levels[0].topks.values()
    assert found == [pytest.approx(first), pytest.approx(first), (0.75, 0.5), (0.75, 0.5)]


@pytest.mark.parametrize(
    "form",
    [
        [*("--train", "all", "--linear", "marginal", "--precision", "bf16", "--anneal", "2", "--levels", "1")],
        ["--train", "gates", "--loss", "flow", "--topk-by", "site", "--ema", "0", "--fit", "0", "--no-checkpointing"],
    ],
    ids=["all", "gates"],
)
def test_other_forms(form: list[str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is trained changes, and nothing else; the result is found by ``generate``."""
    run = tmp_path / "run"
    train(tiny, run, *form, "--samples", "0", "--steps", "3", "--lr", "1e-3")
    gates, fitted = (load_file(run / part / "sla_gates.safetensors") for part in ("result", "fitted"))
    trained = [name for name in gates if not name.endswith("sparsity")]
    assert not any(torch.equal(gates[name], fitted[name]) for name in trained if "bias" not in name)
    assert all(torch.equal(gates[name], fitted[name]) for name in gates if name not in trained)  # annealing has ended
    assert (run / "result/transformer").is_dir() == ("all" in form)
    _, transformer = generated(run, monkeypatch)
    before = diffusers.WanTransformer3DModel.from_pretrained(tiny / "wan/transformer").state_dict()
    after = transformer.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()) == ("gates" in form)


def test_the_student_is_its_own_teacher(tiny: Path) -> None:
    """Adapted, switched and changed, its dense velocity is that of the checkpoint."""
    torch.compiler.reset()
    plain, model = (diffusers.WanTransformer3DModel.from_pretrained(tiny / "wan/transformer") for _ in range(2))
    latents, text = torch.randn(2, 16, 3, 8, 12), torch.randn(2, 512, 32)
    data = list(zip(latents, text, strict=True))
    draw = Draws(data, data, batch=2, device=torch.device("cpu"), shift=3.0, seed=0).training(0)
    options = vars(wan_finetune.arguments(["benchmark", *STUDENT]))
    student = Student(model, "lora", dtype=torch.float32, rank=2, inner="eager", checkpointing=False)
    student.prepare(draw, settings_of(options))
    student.switch()
    trained = student.parameters()
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
        expected = plain(**draw.arguments(torch.float32))[0]
        assert_close("teacher", student.dense_velocity(draw), expected, 1e-5)
        assert (student.velocity(draw) - expected).norm() > 1e-3 * expected.norm()
    student.loss(draw, "teacher").backward()
    assert list(student.parameters()) == list(trained)  # taking the adapters off and on leaves them trainable
    assert all(parameter.grad is not None for parameter in trained.values())
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


def draws(count: int, **options: Any) -> Draws:
    data: Sequence[Any] = [(torch.full((1, 2, 4, 4), float(i)), torch.full((3, 2), float(i))) for i in range(count)]
    return Draws(data, data[:1], device=torch.device("cpu"), seed=1, **{"shift": 1.0, "batch": 2, **options})


def test_draws_are_functions_of_their_position() -> None:
    """Every video once before any comes again; the noisy latents are the flow's; captions are dropped."""
    stream = draws(3)
    seen = [int(text[0, 0]) for position in range(6) for text in stream.training(position).text]
    assert all(Counter(seen[i : i + 3]) == Counter(range(3)) for i in range(0, 12, 3))
    assert len({tuple(seen[i : i + 3]) for i in range(0, 12, 3)}) > 1
    one, again, next_one = (stream.training(position) for position in (4, 4, 5))
    assert torch.equal(one.noisy, again.noisy)
    assert not torch.equal(one.velocity, next_one.velocity)
    clean = one.noisy - one.time.view(-1, 1, 1, 1, 1) * one.velocity
    assert_close("latents", clean, one.text[:, :1, :1, None, None].expand_as(clean), 1e-6)
    parts = draws(3, levels=4)
    times = torch.stack([parts.training(position).time for position in range(80)])
    assert torch.equal((4 * times).ceil().amax(1), (4 * times).ceil().amin(1))  # a batch is of one level
    assert {*(4 * times[:, 0]).ceil().tolist()} == {1.0, 2.0, 3.0, 4.0}
    by_level = parts.fitting_by_level(2)
    assert [*by_level] == [0.125, 0.375, 0.625, 0.875]
    assert {len({float(draw.text[0, 0, 0]) for draw in of_level}) for of_level in by_level.values()} == {2}
    for time, of_level in by_level.items():
        assert all(time - 0.125 < float(draw.time) <= time + 0.125 for draw in of_level)
        assert torch.equal(of_level[0].velocity, by_level[0.125][0].velocity)  # the same videos and noise
    without = draws(3, empty=torch.full((3, 2), -1.0), drop=0.5)
    texts = [float(text[0, 0]) for position in range(40) for text in without.training(position).text]
    assert 20 < texts.count(-1.0) < 60


def test_times_are_shifted_as_the_sampler_shifts_them() -> None:
    scheduler = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=5.0)
    scheduler.set_timesteps(10)
    plain = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=1.0)
    plain.set_timesteps(10)
    assert_close("times", shifted(plain.sigmas[:-1], 5.0), scheduler.sigmas[:-1], 1e-3)
    times = torch.cat([draws(3, shift=3.0).training(position).time for position in range(50)])
    assert ((times > 0) & (times <= 1)).all()
    assert 0.6 < times.mean() < 0.75  # 0.676 is the mean of 3 u / (1 + 2 u)


def refusal(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    with pytest.raises(SystemExit) as end:
        wan_finetune.main(command)
    assert end.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_what_cannot_be_done_is_told(
    tiny: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(checkpoint: Path, videos: Path, *more: str, run: Path = tmp_path / "run") -> str:
        data = ["--checkpoint", str(checkpoint), "--videos", str(videos), "--run", str(run)]
        return refusal(capsys, "train", *data, *STUDENT, *SHORT, *SAMPLED, *more)

    wan, videos = tiny / "wan", tiny / "clips"
    assert "other settings of lr, steps; accepted: the same settings" in told(
        wan, videos, "--orders", "head", "--steps", "9", "--lr", "1", run=whole
    )
    assert "--frames: got 10; accepted: 4 k + 1" in told(wan, videos, "--frames", "10")
    assert "--anneal: got 2 with --levels 2; accepted: with --levels 1" in told(wan, videos, "--anneal", "2")
    assert "--levels: got 0; accepted: above 0" in told(wan, videos, "--levels", "0")
    assert "--max-topk: got 0.1; accepted: more than --topk 0.25" in told(wan, videos, "--max-topk", "0.1")
    assert "--steps: got -1; accepted: 0 (fitted alone) or more" in told(wan, videos, "--steps", "-1")
    assert "--accumulate: got 0; accepted: above 0" in told(wan, videos, "--accumulate", "0")
    assert "SLAConfig.block_q: got 48 (int); accepted: a power of two" in told(wan, videos, "--block", "48")
    assert "unknown option 'tokp'" in told(wan, videos, "--sla", "tokp=0.1")
    assert "have 401 frames at 16 fps; accepted: at least 2" in told(wan, videos, "--frames", "401")
    bare = save_clips(tmp_path / "bare")
    (bare / "clip3.txt").unlink()
    assert "have no caption (clip3.gif); accepted: a .txt" in told(wan, bare)
    (tmp_path / "two").mkdir()
    index = json.loads((wan / "model_index.json").read_text())
    index["transformer_2"] = index["transformer"]
    (tmp_path / "two/model_index.json").write_text(json.dumps(index))
    assert "a WanPipeline with transformer_2; accepted" in told(tmp_path / "two", videos)
    assert "got 90 for videos of 72 tokens" in told(wan, videos, "--min-tokens", "90")
    assert not (tmp_path / "run/settings.json").exists()  # so that another try is no other run
    monkeypatch.setattr(clips, "_optional", lambda name: None)
    with pytest.raises(ValueError, match=r"nothing that decodes \.mp4 is installed; accepted: one of the packages av"):
        read_frames(tmp_path / "clip.mp4", 9, (64, 96), 16)
    assert "no settings.json in" in refusal(capsys, "generate", "--run", str(tmp_path / "run"), "--prompt", "a ball")
    elsewhere = ("--run", str(whole), "--checkpoint", str(videos))
    assert "which has no pipeline of diffusers" in refusal(capsys, "generate", *elsewhere, "--prompt", "a ball")


def test_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    torch.compiler.reset()
    wan_finetune.main(["benchmark", "--model", "tiny", *STUDENT, "--train", "gates", "--repeats", "1"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 attentions SLA" in printed
    assert all(re.search(rf"{name} │ +[\d.]+", printed) for name in ("SLA, flow loss", "SLA, teacher"))
