"""The evaluation command, on predictions files with known scores and on a micro model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from medisee.data import dataset
from medisee.eval import main
from medisee.evaluation.metrics import score
from medisee.evaluation.report import FIGURES, FILES
from medisee.evaluation.scoring import open_splits
from medisee.foundation.errors import InputError, exit_code
from medisee.records.manifest import Manifest
from medisee.records.masks import Rle, decode_mask, encode_mask
from medisee.records.records import (
    Prediction,
    Record,
    read_predictions,
    write_predictions,
    write_records,
)

KEYS = {"emission", "named", "shuffled", "mean_mask", "nearest_slice", "missing"}
GROUPS = {"by_length", "by_perspective", "by_category"}
CATEGORIES = {"liver", "left kidney"}


@pytest.fixture
def manifest(tiny_manifest: Path) -> Manifest:
    return Manifest(tiny_manifest)


@pytest.fixture
def perfect(manifest: Manifest) -> list[Prediction]:
    """The truth as predictions: 4 images x 2 targets x 2 questions."""
    return [
        Prediction(
            record=record.id,
            target=target.id,
            question=qa.question,
            text=f"It is [SEG] and [BBOX]. The {target.category}.",
            emitted=True,
            mask=encode_mask(manifest.mask(record, target)),
        )
        for record in manifest
        for target in record.targets
        for qa in target.qa
    ]


@pytest.fixture
def run(tmp_path: Path, tiny_manifest: Path) -> Callable[..., dict[str, Any]]:
    """Returns a function that evaluates predictions and returns the split's part of the summary."""

    def evaluate(predictions: Iterable[Prediction], *more: str) -> dict[str, Any]:
        write_predictions(tmp_path / "p.jsonl", predictions)
        inputs = ["--predictions", str(tmp_path / "p.jsonl"), "--records", str(tiny_manifest)]
        main([*inputs, "--out", str(tmp_path / "out"), *more])
        return json.loads((tmp_path / "out" / "summary.json").read_text())["splits"]["tiny"]

    return evaluate


def figures(summary: dict[str, Any]) -> list[float]:
    return [summary[name] for name in FIGURES]


def problems_of(call: Callable[[], object]) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        call()
    return caught.value.problems


def empty(prediction: Prediction) -> Prediction:
    return replace(prediction, mask=None, text="", emitted=False)


Run = Callable[..., dict[str, Any]]


def test_perfect_predictions_score_one(run: Run, perfect: list[Prediction], tmp_path: Path) -> None:
    summary = run(perfect)
    assert set(summary) == {"generated"} | KEYS | GROUPS
    assert set(summary["generated"]) == {*FIGURES, "n", "ci95"} and set(summary["generated"]["ci95"]) == set(FIGURES)
    assert figures(summary["generated"]) == [1, 1, 1, 1, 1] and summary["generated"]["n"] == 16
    assert summary["generated"]["ci95"]["Dice"] == [1, 1]
    assert (summary["emission"], summary["named"], summary["missing"]) == (1, 1, 0)
    assert summary["shuffled"] is summary["mean_mask"] is summary["nearest_slice"] is None
    assert set(summary["by_length"]) == {"short", "long"} and set(summary["by_category"]) == CATEGORIES
    assert set(summary["by_perspective"]) == {"attribute", "location"}
    assert set(summary["by_length"]["short"]) == {"generated"} and summary["by_length"]["long"]["generated"]["n"] == 8
    assert set(summary["by_category"]["liver"]) == {"generated", "named"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["seconds"] >= 0 and facts["seed"] == 0 and "settings" in facts


def test_empty_predictions_score_zero(run: Run, perfect: list[Prediction]) -> None:
    summary = run(map(empty, perfect))
    assert figures(summary["generated"]) == [0, 0, 0, 0, 0]
    assert (summary["emission"], summary["named"], summary["missing"]) == (0, 0, 0)


def test_a_known_mixture_has_exact_figures(run: Run, perfect: list[Prediction], manifest: Manifest) -> None:
    def mixed(prediction: Prediction) -> Prediction:
        return prediction if prediction.target == "a" else empty(prediction)

    summary = run(map(mixed, perfect))
    areas = {(r.id, t.id): manifest.mask(r, t).sum() for r in manifest for t in r.targets}
    share = sum(area for (_, target), area in areas.items() if target == "a") / sum(areas.values())
    assert figures(summary["generated"]) == pytest.approx([0.5, 0.5, share, 0.5, 0.5])
    assert summary["by_category"]["liver"]["generated"]["Dice"] == summary["by_category"]["liver"]["named"] == 1
    assert summary["by_category"]["left kidney"]["generated"]["Dice"] == 0
    assert (summary["emission"], summary["named"]) == (0.5, 0.5)
    assert summary["generated"]["ci95"]["Dice"] == [0.5, 0.5], "every image has the same mixture"


def test_a_predicted_box_counts_instead_of_the_masks(run: Run, perfect: list[Prediction]) -> None:
    summary = run(replace(one, box=(0.0, 0.0, 1.0, 1.0)) for one in perfect)
    assert summary["generated"]["Dice"] == 1 and summary["generated"]["Acc"] == 0


def test_missing_predictions_count_as_empty(run: Run, perfect: list[Prediction], tmp_path: Path) -> None:
    summary = run(perfect[:4])
    assert summary["missing"] == 12 and figures(summary["generated"])[0] == 0.25
    assert (summary["emission"], summary["named"]) == (0.25, 0.25)
    assert len(read_predictions(tmp_path / "out" / "predictions.jsonl")) == 4
    assert len((tmp_path / "out" / "scores.csv").read_text().splitlines()) == 17


def test_modes_are_scored_separately(run: Run, perfect: list[Prediction]) -> None:
    forced = [replace(one, mode="forced") for one in map(empty, perfect)]
    summary = run([*forced, *perfect])
    assert (summary["forced"]["Dice"], summary["generated"]["Dice"]) == (0, 1)
    assert (summary["emission"], summary["named"]) == (1, 1)
    assert set(summary["by_length"]["short"]) == {"forced", "generated"}


@pytest.mark.parametrize(
    ("modes", "share"),
    [(("theirs",), 1), (("forced", "theirs"), 1), (("one", "two"), None), (("forced",), None)],
)
def test_whose_text_counts(run: Run, perfect: list[Prediction], modes: tuple[str, ...], share: int | None) -> None:
    summary = run(replace(one, mode=mode) for mode in modes for one in perfect)
    assert (summary["emission"], summary["named"], summary["by_category"]["liver"]["named"]) == (share,) * 3


def test_names_come_from_the_categories_file(run: Run, perfect: list[Prediction], tiny_manifest: Path) -> None:
    latin = [replace(one, text="Ren sinister.") for one in perfect]
    assert run(latin)["named"] == 0
    summary = run(latin, f"data.categories={tiny_manifest.with_name('categories.json')}")
    assert summary["named"] == 0.5 and summary["by_category"]["left kidney"]["named"] == 1


def test_references_come_with_training_manifests(run: Run, perfect: list[Prediction], tiny_manifest: Path) -> None:
    summary = run(perfect, f"data.train=[{{records: {tiny_manifest}}}]")
    assert figures(summary["nearest_slice"]) == [1, 1, 1, 1, 1], "here the test images are the training images"
    assert 0.3 < summary["mean_mask"]["Dice"] < 1 and summary["mean_mask"]["n"] == 16


def test_our_predictions_file_gives_the_same_figures_again(run: Run, perfect: list[Prediction], tmp_path: Path) -> None:
    mixed = [*perfect[:5], *map(empty, perfect[5:])]
    first = run(mixed)
    assert run(read_predictions(tmp_path / "out" / "predictions.jsonl")) == first


def test_a_limit_takes_fewer_records(run: Run, perfect: list[Prediction]) -> None:
    summary = run(perfect, "--limit", "2")
    assert summary["generated"]["n"] == 8 and summary["missing"] == 0


def test_several_splits(tmp_path: Path, manifest: Manifest, perfect: list[Prediction], capsys: Any) -> None:
    for name, part in {"val": manifest[:1], "test": manifest[1:]}.items():
        write_records(tmp_path / f"{name}.jsonl", part)
    write_predictions(tmp_path / "theirs.jsonl", perfect[:4])
    records = [argument for name in ("test", "val") for argument in ("--records", str(tmp_path / f"{name}.jsonl"))]
    root, out = ["--root", str(manifest.root)], ["--out", str(tmp_path / "deep" / "out")]
    main(["--predictions", str(tmp_path / "theirs.jsonl"), *records, *root, *out])
    splits = json.loads((tmp_path / "deep" / "out" / "summary.json").read_text())["splits"]
    assert list(splits) == ["test", "val"]
    assert (splits["val"]["generated"]["Dice"], splits["test"]["generated"]["Dice"]) == (1, 0)
    assert (splits["val"]["missing"], splits["test"]["missing"]) == (0, 12)
    assert "theirs on test" in (tmp_path / "deep" / "out" / "gallery.html").read_text()
    printed = capsys.readouterr().out
    assert "Results on val" in printed and "theirs (generated)" in printed
    assert printed.splitlines()[-1].startswith("done: ") and "table.md" in printed.splitlines()[-1]


def test_targets_without_questions_are_asked_by_name(tmp_path: Path, manifest: Manifest) -> None:
    bare = [replace(one, targets=tuple(replace(target, qa=()) for target in one.targets)) for one in manifest]
    write_records(manifest.root / "bare.jsonl", bare)
    arguments = ["--records", str(manifest.root / "bare.jsonl"), "--out", str(tmp_path / "out")]
    wrong = Prediction(record="r0", target="a", question="liver?", text="", emitted=False)
    write_predictions(tmp_path / "p.jsonl", [wrong])
    (problem,) = problems_of(lambda: main(["--predictions", str(tmp_path / "p.jsonl"), *arguments]))
    asked = problem.split("expected one of ")[1].split("; copy it exactly")[0].strip("'")
    assert "liver" in asked
    write_predictions(tmp_path / "p.jsonl", [replace(wrong, question=asked)])
    main(["--predictions", str(tmp_path / "p.jsonl"), *arguments])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["splits"]["bare"]
    assert set(summary["by_perspective"]) == {"class"} and summary["missing"] == 7


def test_repeated_questions_are_asked_once(tmp_path: Path, manifest: Manifest) -> None:
    first = manifest[0]
    twice = replace(first, targets=tuple(replace(t, qa=(*t.qa, t.qa[0])) for t in first.targets))
    write_records(tmp_path / "twice.jsonl", [twice])
    (split,) = open_splits([tmp_path / "twice.jsonl"], manifest.root, None)
    assert [case.qa for case in split.cases] == [qa for target in first.targets for qa in target.qa]


SMALL = encode_mask(np.ones((3, 5), dtype=bool))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"record": "r00"}, "unknown record; expected one that has targets in"),
        (
            {"target": "c"},
            "record 'r0', target 'c', mode 'generated', question 'Which organ makes bile?': unknown target",
        ),
        ({"target": "c"}, "expected one of 'a', 'b'"),
        (
            {"question": "Why?"},
            "question 'Why?': unknown question; expected one of 'Which organ makes bile?', 'Which large",
        ),
        ({"mask": SMALL}, "the mask is [3, 5] ([height, width]), but the image is [48, 64]"),
        ({"mode": "named"}, "mode 'named' is already a key of summary.json"),
    ],
)
def test_refuses_bad_predictions(
    run: Run, perfect: list[Prediction], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    (problem,) = problems_of(lambda: run([replace(perfect[0], **change), *perfect[1:]]))
    assert problem.startswith(str(tmp_path / "p.jsonl")) and message in problem
    assert not (tmp_path / "out").exists()


def test_suggests_the_nearest_record(run: Run, perfect: list[Prediction]) -> None:
    (problem,) = problems_of(lambda: run([replace(perfect[0], record="r00")]))
    assert problem.endswith("Did you mean 'r0'?")


def test_refuses_two_answers_to_one_question(run: Run, perfect: list[Prediction]) -> None:
    (problem,) = problems_of(lambda: run([*perfect, empty(perfect[3])]))
    assert "record 'r0', target 'b'" in problem and "more than one prediction" in problem


def test_names_ten_problems_and_counts_the_rest(run: Run, perfect: list[Prediction]) -> None:
    problems = problems_of(lambda: run(replace(one, target="z") for one in perfect))
    assert len(problems) == 11 and problems[-1].endswith("and 6 more problems")


def test_refuses_a_file_without_predictions(run: Run) -> None:
    assert "no prediction" in problems_of(lambda: run([]))[0]


def test_all_problems_of_all_manifests_are_reported_at_once(tmp_path: Path, manifest: Manifest) -> None:
    no_image, no_mask = replace(manifest[0], image="none.png"), manifest[1].targets[0]
    no_mask = replace(manifest[1], targets=(replace(no_mask, mask="gone.png"),))
    write_records(tmp_path / "one.jsonl", [no_image])
    write_records(tmp_path / "two.jsonl", [no_mask])
    records = ["--records", str(tmp_path / "one.jsonl"), "--records", str(tmp_path / "two.jsonl")]
    arguments = [*records, "--root", str(manifest.root), "--predictions", "p.jsonl", "--out", str(tmp_path / "out")]
    problems = problems_of(lambda: main(arguments))
    assert len(problems) == 2 and "none.png" in problems[0] and "gone.png" in problems[1]
    assert all("does not exist" in problem for problem in problems)


def test_refuses_manifests_that_cannot_be_told_apart(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "sub").mkdir()
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "sub" / "a.jsonl"]
    for path, part in zip(paths, (manifest[:2], manifest[1:], manifest[2:]), strict=True):
        write_records(path, part)
    (problem,) = problems_of(lambda: open_splits(paths[:2], manifest.root, None))
    assert "1 record ids are in more than one manifest, such as 'r1'" in problem
    (problem,) = problems_of(lambda: open_splits(paths[::2], manifest.root, None))
    assert "2 manifests are called 'a'" in problem


def test_refuses_a_manifest_without_targets(tmp_path: Path, manifest: Manifest) -> None:
    write_records(tmp_path / "none.jsonl", [replace(manifest[0], targets=())])
    (problem,) = problems_of(lambda: open_splits([tmp_path / "none.jsonl"], manifest.root, None))
    assert "no record has a target" in problem


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --checkpoint or --predictions"),
        (["--checkpoint", "c", "--predictions", "p.jsonl"], "give either --checkpoint or --predictions"),
        (["--predictions", "p.jsonl", "--decode", "both"], "--decode: a predictions file has its own modes"),
        (["--predictions", "p.jsonl", "--limit", "0"], "--limit 0: expected 1 or more"),
        (["--predictions", "none.jsonl"], "none.jsonl: cannot be read"),
        (["--predictions", "p.jsonl", "eval.resample=3"], "Did you mean 'resamples'?"),
        (["--predictions", "p.jsonl", "data.categories=none.json"], "none.json: cannot be read"),
        (["--predictions", "p.jsonl", "data.train=[{records: none.jsonl}]"], "none.jsonl: cannot be read"),
        (["--predictions", "p.jsonl", "--config", "none.yaml"], "none.yaml: cannot read the configuration"),
        (["--checkpoint", "none"], "no checkpoint here"),
    ],
)
def test_refuses_bad_arguments(
    tmp_path: Path, tiny_manifest: Path, arguments: list[str], message: str, capsys: Any
) -> None:
    always = ["--records", str(tiny_manifest), "--out", str(tmp_path / "out")]
    assert exit_code(main, [*arguments, *always]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_refuses_to_replace_other_files(run: Run, perfect: list[Prediction], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert "holds 'thesis.tex'" in problems_of(lambda: run(perfect))[0]
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_nothing_is_half_written(
    run: Run, perfect: list[Prediction], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError("disk full")

    before = run(perfect)
    monkeypatch.setattr("medisee.evaluation.report.write_gallery", broken)
    with pytest.raises(OSError, match="disk full"):
        run(perfect[:3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "p.jsonl"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["splits"]["tiny"] == before


def test_help_teaches(capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for words in ("--predictions theirs.jsonl", "summary.json", "--decode {forced,generate,both}", "--limit"):
        assert words in text


@pytest.fixture(scope="session")
def tiny_run(tiny_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run's configuration as a file."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config), encoding="utf-8")
    return path


def test_a_checkpoint_is_evaluated(tiny_run: Path, tiny_checkpoint: Path, manifest: Manifest, tmp_path: Path) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    inputs = ["--config", str(tiny_run), "--checkpoint", str(tiny_checkpoint), "--records", str(manifest.path)]
    main([*inputs, "--out", str(out), "--limit", "2", f"data.cache={cache}"])
    assert any(cache.rglob("*.safetensors"))
    summary = json.loads((out / "summary.json").read_text())["splits"]["tiny"]
    assert set(summary) == {"forced", "generated"} | KEYS | GROUPS
    assert set(summary["shuffled"]) == {"Dice"} and summary["missing"] == 0
    assert all(summary[system]["n"] == 8 for system in ("forced", "generated", "mean_mask", "nearest_slice"))
    assert set(summary["by_category"]["liver"]) == {"forced", "generated", "named"}
    predictions = read_predictions(out / "predictions.jsonl")
    assert [one.mode for one in predictions] == ["forced"] * 8 + ["generated"] * 8
    assert all(one.emitted and one.text == "It is [SEG] and [BBOX]." for one in predictions[:8])
    assert summary["forced"]["Dice"] == pytest.approx(np.mean([dice(manifest, one) for one in predictions[:8]]))
    facts = json.loads((out / "run.json").read_text())
    assert facts["settings"]["model"]["router_hidden"] == 16 and facts["seconds"] > 0


def dice(manifest: Manifest, prediction: Prediction) -> float:
    record = next(one for one in manifest if one.id == prediction.record)
    target = next(one for one in record.targets if one.id == prediction.target)
    assert isinstance(prediction.mask, Rle)
    return score(decode_mask(prediction.mask), manifest.mask(record, target)).dice


@pytest.mark.parametrize(
    ("decode", "modes"), [("forced", {"forced"}), ("generate", {"generated"}), ("both", {"forced", "generated"})]
)
def test_decode_chooses_the_answers(
    decode: str, modes: set[str], tiny_checkpoint: Path, tiny_manifest: Path, tmp_path: Path
) -> None:
    """Without a configuration the model is the checkpoint's own, and there are no references."""
    inputs = ["--checkpoint", str(tiny_checkpoint), "--records", str(tiny_manifest), "--limit", "1"]
    settings = ["--decode", decode, "eval.max_new_tokens=4", "eval.resamples=5"]
    main([*inputs, *settings, "--out", str(tmp_path / "out")])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["splits"]["tiny"]
    assert set(summary) == modes | KEYS | GROUPS
    assert (summary["shuffled"] is not None) == ("forced" in modes)
    assert (summary["named"] is not None) == (summary["emission"] is not None) == ("generated" in modes)
    assert summary["mean_mask"] is None


def test_bits_are_those_of_the_configuration(
    tiny_run: Path, tiny_checkpoint: Path, tiny_manifest: Path, tmp_path: Path
) -> None:
    inputs = ["--checkpoint", str(tiny_checkpoint), "--records", str(tiny_manifest), "--out", str(tmp_path / "out")]
    chosen = ["model.mllm.source=lab/none", "model.mllm.train=frozen", "model.mllm.bits=4"]
    (problem,) = problems_of(lambda: main(["--config", str(tiny_run), *inputs, *chosen]))
    assert "holds all of its language model, so bits cannot be chosen" in problem


@pytest.mark.parametrize("says", [["--config", "CONFIG"], []])
def test_refuses_another_models_configuration(
    says: list[str], tiny_run: Path, tiny_checkpoint: Path, tiny_manifest: Path, tmp_path: Path
) -> None:
    config = [str(tiny_run) if word == "CONFIG" else word for word in says]
    inputs = ["--checkpoint", str(tiny_checkpoint), "--records", str(tiny_manifest), "--out", str(tmp_path / "out")]
    (problem,) = problems_of(lambda: main([*config, *inputs, "model.router_hidden=17", "model.fusion=hard"]))
    assert problem.startswith(str(tiny_checkpoint)) and "another model section" in problem
    if says:
        assert "model.fusion = 'hard' but the checkpoint has 'soft'" in problem
        assert "model.router_hidden = 17 but the checkpoint has 16" in problem
    assert not (tmp_path / "out").exists()


def test_records_without_targets_are_passed_over(tiny_checkpoint: Path, manifest: Manifest, tmp_path: Path) -> None:
    bare: list[Record] = [replace(manifest[0], targets=()), manifest[1]]
    write_records(manifest.root / "mixed.jsonl", bare)
    inputs = ["--checkpoint", str(tiny_checkpoint), "--records", str(manifest.root / "mixed.jsonl")]
    main([*inputs, "--out", str(tmp_path / "out"), "eval.max_new_tokens=4", "eval.resamples=5"])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["splits"]["mixed"]
    assert summary["generated"]["n"] == 4


def test_the_listed_questions_are_those_that_are_scored(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With them, and nothing else known, a predictions file is complete; a target without questions is in the list."""
    bare = [
        replace(one, targets=tuple(replace(t, qa=t.qa if t.id == "a" else ()) for t in one.targets)) for one in manifest
    ]
    write_records(tmp_path / "bare.jsonl", bare)
    inputs = ["--records", str(tmp_path / "bare.jsonl"), "--limit", "3"]
    main(["--list-questions", *inputs])
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(listed) == 3 * 3 and all(set(one) == {"record", "target", "question"} for one in listed)
    main(["--list-questions", *inputs, "--out", str(tmp_path / "q.jsonl")])
    assert [json.loads(line) for line in (tmp_path / "q.jsonl").read_text(encoding="utf-8").splitlines()] == listed
    lines = "".join(json.dumps({**one, "text": "", "emitted": False}) + "\n" for one in listed)
    (tmp_path / "p.jsonl").write_text(lines, encoding="utf-8")
    scored = [
        "--predictions",
        str(tmp_path / "p.jsonl"),
        *inputs,
        "--root",
        str(manifest.root),
        "--out",
        str(tmp_path / "out"),
    ]
    main(scored)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["splits"]["bare"]
    assert summary["generated"]["n"] == 9 and summary["missing"] == 0


def test_a_failure_keeps_the_answers_so_far(
    tiny_checkpoint: Path,
    tiny_manifest: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = ["--records", str(tiny_manifest), "--out", str(tmp_path / "out")]
    system = ["--checkpoint", str(tiny_checkpoint), "--decode", "forced", "eval.batch_size=1", "eval.resamples=5"]
    read = dataset.read_image

    def lost(path: Path) -> np.ndarray:
        if path.name == "3.png":
            raise InputError(f"{path}: the disk is gone.")
        return read(path)

    monkeypatch.setattr(dataset, "read_image", lost)
    for number in (1, 2):
        assert exit_code(main, [*system, *inputs]) == 2
        kept = tmp_path / f"out.partial{number}.jsonl"
        told = capsys.readouterr().err
        assert f"{kept}: keeps the 12 answers so far; --predictions scores them." in told and "is gone" in told
        assert not (tmp_path / "out").exists()
    predictions = read_predictions(kept)
    assert {(one.record, one.mode) for one in predictions} == {(f"r{index}", "forced") for index in range(3)}
    monkeypatch.undo()
    main(["--predictions", str(kept), *inputs])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["splits"]["tiny"]
    assert summary["missing"] == 4 and summary["forced"]["n"] == 16
    main([*system, "--records", str(tiny_manifest), "--out", str(tmp_path / "again")])
    assert not list(tmp_path.glob("again.partial*"))
    assert read_predictions(tmp_path / "again" / "predictions.jsonl")[:12] == predictions


def test_all_texts_are_looked_at_before_the_first_is_asked(
    tiny_checkpoint: Path, manifest: Manifest, tmp_path: Path
) -> None:
    def long(record: Record) -> Record:
        target = record.targets[1]
        return replace(
            record, targets=(record.targets[0], replace(target, qa=(replace(target.qa[0], question="why " * 1500),)))
        )

    write_records(tmp_path / "r.jsonl", [manifest[0], long(manifest[1]), long(manifest[2])])
    inputs = [
        "--checkpoint",
        str(tiny_checkpoint),
        "--records",
        str(tmp_path / "r.jsonl"),
        "--root",
        str(manifest.root),
    ]
    problems = problems_of(lambda: main([*inputs, "--out", str(tmp_path / "out")]))
    assert [problem.split(": the text has")[0] for problem in problems] == [
        f"{tmp_path / 'r.jsonl'}:{n + 1}: record 'r{n}', target 'b'" for n in (1, 2)
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.jsonl"]


def test_predicted_boxes_of_another_form_are_refused(run: Run, perfect: list[Prediction], tmp_path: Path) -> None:
    shares = [replace(one, box=(0.1, 0.2, 0.5, 0.75)) for one in perfect]
    (problem,) = problems_of(lambda: run(shares))
    assert problem.startswith(str(tmp_path / "p.jsonl")) and "fit as shares of the image's width and height" in problem
