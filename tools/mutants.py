"""Break the core in some ninety ways, one at a time, and count what the tests notice: `make mutants`.

Each break is a line of the table: a file of the package, what stands there, what is put in its place, and the tests
nearest to it, which must fail. It happens in a copy; the tests themselves were seen to pass. Not part of `make test`.

    python tools/mutants.py [WORD ...]    only breaks with such a word in file or text
"""

import contextlib
import importlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
WORKERS, SECONDS, WANTED = os.cpu_count() or 1, 300, 0.95
HEAVY = ("numpy", "torch", "scipy.integrate", "pandas", "PIL.Image", "hypothesis", "pytest", "safetensors.torch")


class Mutant(NamedTuple):
    "One break."

    file: str  # In guidance_nb/
    old: str  # Stands there once
    new: str
    tests: str  # A module of tests, and words for its -k
    reason: str = ""  # Why no test needs to notice it


MUTANTS = [
    # paths
    Mutant("paths.py", "return 1 / (1 + 1 / noise_to_signal)", "return 1 / (1 + noise_to_signal)", "paths"),
    Mutant("paths.py", "-0.5 * (self.beta_min + t *", "-1.0 * (self.beta_min + t *", "paths derivatives"),
    Mutant("paths.py", "last if self.alpha(torch.ones(())) <= 1e-3 else math.inf", "last", "paths cap"),
    Mutant("paths.py", "torch.where(ratio > 1, noise, signal)", "torch.where(ratio > 1, signal, noise)", "paths"),
    Mutant("paths.py", "t = t.clamp(min=self._first_time)", "t = t.clamp(min=0)", "paths finite"),
    Mutant("paths.py", "bad := ~((t >= 0) & (t <= 1))", "bad := (t < 0) | (t > 1)", "paths outside"),
    # denoisers
    Mutant("denoisers.py", 't = clamp_time(path, t, "noise" if prediction == "eps" else "data")', "t = t",
           "denoisers decoding"),
    Mutant("denoisers.py", "b * x - sigma * y", "b * x + sigma * y", "denoisers decod"),
    Mutant("denoisers.py", "within = clamp_time(self.path, t.clamp(max=self.last_time))",
           "within = t.clamp(max=self.last_time)", "denoisers another_path",
           "a second guard: `change_path` answers at pure noise, and so does every model"),
    Mutant("denoisers.py", "ratio.log() / 4", "ratio.log() / 2", "denoisers edm"),
    Mutant("denoisers.py", "signal = self.path.alpha(time) * self.sigma_data", "signal = self.path.alpha(time)",
           "denoisers edm"),
    Mutant("denoisers.py", "wide = torch.promote_types(x.dtype, torch.float32)", "wide = x.dtype",
           "denoisers sixteen"),
    Mutant("denoisers.py", "torch.arange(2 * n, device=x.device) >= n", "torch.arange(2 * n, device=x.device) < n",
           "denoisers pairs"),
    Mutant("denoisers.py", "record_nfe(x.shape[0])\n        try", "record_nfe(1)\n        try", "denoisers counted"),
    Mutant("denoisers.py", "(c < 0) | (c >= num_classes)", "(c < 0) | (c > num_classes)", "denoisers bad_input"),
    Mutant("denoisers.py", "r + scale * (c - r)", "c + scale * (c - r)", "denoisers guide"),
    Mutant("_conditions.py", "drop.to(c.device).reshape(-1, *[1] * (c.ndim - 1))", "drop.to(c.device)",
           "denoisers embedding"),
    # samplers
    Mutant("samplers.py", "return 2 * path.sigma(t)", "return path.sigma(t)", "samplers diffusion"),
    Mutant("samplers.py", "with bar, eval_mode(model):", "with bar:", "samplers mode"),
    Mutant("samplers.py", "@torch.no_grad()\ndef sample(", "def sample(", "samplers gradient"),
    Mutant("samplers.py", "(u + model.velocity(guess, s, c)) / 2", "(u + model.velocity(guess, t, c)) / 2",
           "samplers orders"),
    Mutant("samplers.py", 'h / (2 * extra.memory["h"])', 'h / extra.memory["h"]', "samplers dpm"),
    Mutant("samplers.py", "extra.eta * path.sigma(s) * (1 - ratio**2).sqrt()",
           "extra.eta * path.sigma(s) * (1 - ratio).sqrt()", "samplers ddpm"),
    Mutant("samplers.py", "path.sigma(s) ** 2 * (1 - ratio**2) * shift", "path.sigma(s) * (1 - ratio**2) * shift",
           "classifier_guidance mean_shift"),
    Mutant("samplers.py", "velocity(t.cpu().clamp(low, high), x)", "velocity(t.cpu(), x)", "samplers adaptive"),
    Mutant("samplers.py", "evaluations.total / len(x))", "2 * evaluations.total / len(x))", "samplers counted"),
    Mutant("samplers.py", "NoiseSource(seed, start + i,", "NoiseSource(seed, start,", "samplers depend"),
    Mutant("samplers.py", "if not torch.isfinite(x).all():", "if False:", "samplers divergence"),
    Mutant("samplers.py", "pair.velocity(model.path, t) - 0.5 * g2", "pair.velocity(model.path, t) + 0.5 * g2",
           "samplers marginals"),
    # random numbers, modes, files
    Mutant("_random.py", "block << 32 | step", "block << 8 | step", "samplers far"),
    Mutant("_random.py", "torch.cat(blocks)[start % 256 :][:n]", "torch.cat(blocks)[:n]", "samplers depend"),
    Mutant("_random.py", "divmod(start * batch_size, size)", "divmod(start, size)", "checkpoints constant_schedule"),
    Mutant("_random.py", "while len(order) < batch_size:", "if len(order) < batch_size and not epoch:",
           "training epoch"),
    Mutant("_modes.py", "part.training = True", "part.training = False", "samplers mode"),
    Mutant("_files.py", "if owner and not _lives(int(owner[1])):", "if owner:", "disk remnants"),
    Mutant("_files.py", "force_to_disk(part)", "part", "checkpoints last_moment"),
    Mutant("_files.py", "    finally:\n        remove(aside)", "    finally:\n        pass", "disk no_room"),
    Mutant("_files.py", "os.replace(aside, path)\n", "shutil.copytree(aside, path) if aside.is_dir() else "
           "path.write_bytes(aside.read_bytes())\n", "checkpoints middle"),
    Mutant("cli/_evaluation.py", 'with write_aside(out / "curves.png") as aside:',
           'with open(out / "curves.png", "wb") as aside:', "disk no_room"),
    # training
    Mutant("training.py", "                kept.copy_(new)", "                pass", "training ema or average"),
    Mutant("training.py", "requires_grad_(False).eval()", "requires_grad_(False)", "training mode or average"),
    Mutant("training.py", "return min(ema, (1 + step) / (10 + step))", "return ema", "training short_run"),
    Mutant("training.py", "return lr * (step + 1) / warmup", "return lr * step / warmup", "engine warm_up"),
    Mutant("training.py", "self.own(torch.rand, x) < probability", "self.own(torch.rand, x) > probability",
           "engine bits"),
    Mutant("training.py", "return self.own(torch.rand, x).to(x.dtype)", "return 0.5 * self.own(torch.rand, x)",
           "engine bits"),
    Mutant("training.py", "0.5 * (1 + math.cos", "0.5 * (1 - math.cos", "training adam"),
    # the engine
    Mutant("engine/_run.py", "        if run.whole:\n            run.save", "        if True:\n            run.save",
           "checkpoints caught_between"),
    Mutant("engine/_run.py", "        for kept, new in zip(self.average.buffers(), self.model.buffers()):\n"
           "            kept.copy_(new)", "", "engine the_buffers"),
    Mutant("engine/_run.py", 'held.enter_context(locked(folder / ".lock", wait=False))',
           'locked(folder / ".lock", wait=False)', "checkpoints two_trainings"),
    Mutant("engine/_run.py", 'clean_remnants(folder, "step-*")', "pass", "checkpoints middle"),
    Mutant("engine/_run.py", "self.changes = found.record[\"changes\"] + changes", "self.changes = changes",
           "checkpoints stated"),
    Mutant("engine/_checkpoints.py", '_measure(path / name) != written:', "False:",
           "checkpoints damaged"),
    Mutant("engine/_checkpoints.py", "[found.index(newest) :][:keep]", "[:keep]", "checkpoints past_a_damaged"),
    Mutant("engine/_interrupts.py", "raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)",
           "raise KeyboardInterrupt", "checkpoints signals"),
    # guidance
    Mutant("guidance.py", "(t <= last * (1 + 1e-6))", "(t <= last)",
           "guidance_contract interval_ends"),
    Mutant("guidance.py", 'late, early = clamp_time(path, t, "data"), clamp_time(path, t)',
           'late, early = clamp_time(path, t, "data"), t', "guidance_variants both_ends"),
    Mutant("guidance.py", 'path.sigma(early if space == "score" else t)', "path.sigma(t)",
           "classifier_guidance pure_noise"),
    Mutant("guidance.py", "wide = x.to(torch.promote_types(x.dtype, torch.float32))\n        towards",
           "wide = x\n        towards", "guidance_contract half_precision"),
    Mutant("guidance.py", "if zero and self.claims.unconditional_at_zero:", "if zero:",
           "guidance_variants scale_zero"),
    Mutant("guidance.py", "order = torch.cat(index).argsort()", "order = torch.cat(index)",
           "classifier_free_guidance own_question"),
    Mutant("guidance.py", "2 - 2 * (2 * t - 1).abs()", "1 - (2 * t - 1).abs()",
           "guidance_variants schedules"),
    # the five methods
    Mutant("classifier_guidance.py", "        t = clamp_time(self.path, t)\n", "",
           "classifier_guidance signal_is_left"),
    Mutant("classifier_guidance.py", " - int(self.conditional_base)", "", "classifier_guidance tilted or published"),
    Mutant("classifier_free_guidance.py", "if k else -log_ratio", "if k else log_ratio",
           "classifier_free_guidance variances or two_gaussians"),
    Mutant("aligned_loss.py", "self.anchor * (y - e_u)", "self.anchor * (y - e_c)", "aligned_loss anchor or formula"),
    Mutant("aligned_loss.py", "guided = e_u + self.scale", "guided = e_c + self.scale", "aligned_loss formula"),
    Mutant("model_guidance.py", "return y[0] - y[1]", "return y[1] - y[0]", "model_guidance contrastive"),
    Mutant("model_guidance.py", "return s, (s - 1) * guided", "return s, s * guided", "model_guidance by_hand"),
    Mutant("model_guidance.py", "self.step *= -self.shrink", "self.step *= self.shrink", "model_guidance auto_weight"),
    Mutant("cli/_evaluation.py", "self.every == 0 and step > self.moved_at", "self.every == 0", "recipes moves"),
    Mutant("flow_postprocessing.py", "with eval_mode(self), tqdm(", "with tqdm(", "flow_postprocessing modes"),
    Mutant("flow_postprocessing.py", "(error / model.spread).square()", "error.square()",
           "flow_postprocessing in_the_unit"),
    Mutant("flow_postprocessing.py", "/ self.neighbours.numel()", "/ len(self.neighbours)",
           "flow_postprocessing weights or effective"),
    # variants
    Mutant("guidance_variants.py", ".clamp(min=self.limit), x0)", ", x0)", "guidance_variants small_samples"),
    Mutant("guidance_variants.py", "AtLeastZero = 8.0", "AtLeastZero = 4.0", "guidance_variants magnitude"),
    Mutant("guidance_variants.py", "(best - 1) * u_u", "best * u_u", "guidance_variants zero_star"),
    Mutant("guidance_variants.py", "self.phi * (ratio - 1) * u", "self.phi * ratio * u", "guidance_variants rescale"),
    Mutant("guidance_variants.py", "(1 - self.eta) * _projection", "self.eta * _projection", "guidance_variants apg"),
    Mutant("guidance_variants.py", "when = now < self.times,", "when = now <= self.times,",
           "guidance_variants step_memory"),
    # metrics, networks, images, the command line
    Mutant("metrics.py", "< threshold[c])", "< threshold[0])", "metrics outlier_rate"),
    Mutant("metrics.py", "search(centres, centres, k + 1, device)", "search(centres, centres, k, device)",
           "metrics precision_recall"),
    Mutant("metrics.py", "return share(x, y), share(y, x)", "return share(y, x), share(x, y)", "metrics narrow"),
    Mutant("metrics.py", "- 2 * product", "- product", "metrics frechet"),
    Mutant("_points.py", "centre = y.mean(0)", "centre = 0 * y.mean(0)", "metrics neighbours or exact",
           "the bound of the rounding error finds what an offset hides: slower, and as exact"),
    Mutant("_points.py", "if size < len(y) and len(unsure):", "if False:", "metrics exact"),
    Mutant("networks.py", "fourier_features(scale / 8)", "fourier_features(scale)", "networks scale or training"),
    Mutant("images/_networks.py", "fourier_features(scale / 8)", "fourier_features(scale)", "networks slow_period"),
    Mutant("images/_data.py", "image = ImageOps.exif_transpose(file)", "image = file", "image_data upright"),
    Mutant("images/_data.py", '"white"), image', '"black"), image', "image_data white"),
    Mutant("images/_data.py", "[rows] < 0.5", " < 0.5", "image_data processes"),
    Mutant("images/_data.py", "file.stat().st_mtime_ns", "0", "image_data other_data"),
    Mutant("cli/_run.py", "({} if numbered else", "({} if False else", "recipes numbers or index"),
    Mutant("cli/_evaluation.py", "return torch.tensor([extractor.classes.index(name) for name in known])[file.c]",
           "return file.c", "recipes matched"),
]  # fmt: skip


def apply(mutant: Mutant, place: Path) -> None:
    "Make a copy of the project with one break."
    for name in ("guidance_nb", "tests", "tools", "nbs"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__", "runs"))
    file = place / "guidance_nb" / mutant.file
    file.write_text(file.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")


def run_tests(mutant: Mutant, place: Path) -> int:
    "What pytest returns for the nearest tests, in the copy; this process is spent afterwards."
    import pytest

    os.chdir(place)
    os.environ["PYTHONPATH"] = str(place)
    sys.path[:0] = [str(place)]
    with open(place / "log", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        module, _, words = mutant.tests.partition(" ")
        choice = ["-k", words if " or " in words else words.replace(" ", " and ")] if words else []
        options = ["-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "pythonpath=tools"]
        return int(pytest.main([*options, "--rootdir", str(place), f"tests/test_{module}.py", *choice]))


def outcomes(mutants: list[Mutant], folder: Path) -> Iterator[tuple[Mutant, str]]:
    "Each break, and whether it was noticed; a process for each, forked from one that has imported what is slow."
    waiting, running = list(enumerate(mutants)), {}
    while waiting or running:
        while waiting and len(running) < WORKERS:
            number, mutant = waiting.pop(0)
            place = folder / str(number)
            apply(mutant, place)
            if (pid := os.fork()) == 0:
                code = 99
                with contextlib.suppress(BaseException):
                    code = run_tests(mutant, place)
                os._exit(code)
            running[pid] = (mutant, place, time.monotonic())
        for pid, (mutant, place, start) in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            late = time.monotonic() - start > SECONDS
            if late:
                os.kill(pid, 9)
                os.waitpid(pid, 0)
            if ended or late:
                words = {0: "survived", 1: "noticed"}
                code = os.waitstatus_to_exitcode(status) if ended else 1
                yield mutant, words.get(code, f"pytest ended with {code}, see {place / 'log'}")
                del running[pid]
        time.sleep(0.05)


def main() -> None:
    "Run the breaks that are asked for, print those that survive, and the share that was noticed."
    words = sys.argv[1:]
    mutants = [m for m in MUTANTS if not words or any(word in f"{m.file} {m.old} {m.tests}" for word in words)]
    texts = {m.file: (ROOT / "guidance_nb" / m.file).read_text(encoding="utf-8") for m in mutants}
    for mutant in mutants:
        if (count := texts[mutant.file].count(mutant.old)) != 1:
            sys.exit(f"{mutant.file} holds {mutant.old!r} {count} times; allowed: once, so bring the table up to date")
    for name in HEAVY:
        importlib.import_module(name)
    noticed, folder, start = 0, Path(tempfile.mkdtemp(prefix="mutants-")), time.monotonic()
    for mutant, outcome in outcomes(mutants, folder):
        noticed += outcome == "noticed"
        if outcome != "noticed":
            told = f"{mutant.file}: {mutant.old!r} -> {mutant.new!r} ({mutant.reason or mutant.tests})"
            print(f"{outcome}: {told}", flush=True)
    share, spent = noticed / len(mutants), time.monotonic() - start
    print(f"{noticed} of {len(mutants)} breaks noticed, {share:.1%}, in {spent:.0f} s")
    if noticed < WANTED * len(mutants):
        sys.exit(f"allowed: {WANTED:.0%} or more")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
