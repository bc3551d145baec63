"""The page of a run, made of the files in its output directory: finished, interrupted, broken."""

import json

import pytest

from soul.cli import main
from soul.report import markdown
from soul.report.evaluation import evaluation_page
from soul.report.page import BAD, GOOD, MIXED, OPEN, Charts, Samples, Table
from soul.report.records import Run
from soul.report.run import report_on_run, run_page

STEPS = [{"step": i, "epoch": 1, "lr": 1e-5 * i, "loss": 2.0 - i / 10, "loss_forget": 1.0, "loss_retain": 1.0 - i / 10,
          "forget_nll": 0.3 * i, "retain_nll": 0.5, "grad_norm": None if i == 2 else 1.0, "clip_fraction": 0.5, "rho": 0.04,
          "tokens_per_s": 90.0, "peak_memory_gib": 1.5} for i in (1, 2, 3, 4)]  # fmt: skip
AIMS = [{"event": "aim", "step": step, "tokens": 9, "forget_prob": f, "control_prob": c, "lr": 1e-5, "alpha": alpha}
        for step, f, c, alpha in ((2, 0.4, 0.55, 3.0), (4, 0.15, 0.58, 5.0))]  # fmt: skip
PILOT = [{"event": "pilot", "step": 0, "lr": 1e-5, "alpha": 2.0, "response": 0.2, "kept": 0.98},
         {"event": "pilot", "step": 0, "lr": 1e-4, "alpha": 2.0, "response": None, "kept": None}]  # fmt: skip
VERDICT = {"reached": True, "forget_prob": 0.15, "forget_prob_start": 0.67, "aim": 0.16, "aim_source": "chance",
           "step": 4, "control_prob": 0.58, "control_prob_start": 0.6, "keep": 0.95,
           "reason": "aim and keep held twice", "advice": ""}  # fmt: skip
NOTES = {
    "environment": {"device": "a <processor>", "torch": "2.13", "parameters": 1000},
    "max_new_tokens": 40,
    "prompts": [{"set": "forget", "prompt": "Who <b>?", "answer": "Me."}, {"set": "general", "prompt": "Why?", "answer": ""}],
    "asked": [
        {"step": 0, "texts": ["Me.", "So."], "probabilities": {"0": 0.7}, "retain_prob": 0.6},
        {"step": 2, "texts": ["M", " "], "probabilities": {"0": 0.3}},
        {"step": 4, "end": True, "texts": ["\x1b[1mNo", "So!"], "probabilities": {"0": 0.001}, "retain_prob": 0.59},
    ],
    "forget_prob": [0.67, 0.1],
    "seconds": 75.0,
    "ended_at": "2026-11-26 10:24",
}
OPTIONS = {"model": "a/b <c>", "method": "npo", "optimizer": "soul", "template": "chat", "forget": "f.jsonl", "lr": 1e-5,
           "option": [], "merge": False, "system": None}  # fmt: skip


def directory(path, *, log=(), ended=True, **files):
    """Write the output directory of a run; a file that is None is left out."""
    path.mkdir(exist_ok=True)
    contents = {"soul_config": OPTIONS, "data": {"forget": {"rows": 12, "blank": 1}, "retain": {"rows": 36, "blank": 0}},
                "report": NOTES, **files}  # fmt: skip
    for name, content in contents.items():
        if content is not None:
            (path / f"{name}.json").write_text(json.dumps(content))
    (path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log or STEPS))
    if ended:
        (path / "soul_ended.txt").touch()
    return path


def page_of(path, **files):
    return run_page(Run(directory(path, **files)))


def blocks(page, kind):
    return [block for section in page.sections for block in section.blocks if isinstance(block, kind)]


def curves(page):
    return {chart.title: {s.name: s.points for s in chart.series} for block in blocks(page, Charts) for chart in block.charts}


def test_a_run_with_an_aim(tmp_path):
    page = page_of(tmp_path / "out", log=[*PILOT, *STEPS[:2], AIMS[0], *STEPS[2:], AIMS[1]], verdict=VERDICT)
    assert page.verdict.outcome == GOOD and page.verdict.headline == "Aim reached"
    text = " ".join(page.verdict.sentences)
    assert "0.150, from 0.670. The aim was at most 0.160 (chance)." in text and "97% of the start; at least 95% were" in text
    shown = curves(page)
    points = {"forget": ((0, 0.67), (2, 0.4), (4, 0.15)), "control": ((0, 0.6), (2, 0.55), (4, 0.58))}
    assert shown["Probability of the answers"] == points
    assert shown["Alpha, the weight of keeping"]["alpha"] == ((2, 3.0), (4, 5.0))
    assert shown["Norm of the gradient"]["gradient norm"] == ((1, 1.0), (3, 1.0), (4, 1.0))  # null is left out
    (probabilities,) = [chart for block in blocks(page, Charts) for chart in block.charts if chart.unit_interval][:1]
    assert [level.height for level in probabilities.levels] == [0.16, pytest.approx(0.57)]
    pilot = blocks(page, Table)[0]
    assert pilot.rows == (("1e-05", "2", "0.2", "98%"), ("0.0001", "2", "diverged", "diverged"))
    missed = {**VERDICT, "reached": False, "advice": "raise --epochs"}
    page = page_of(tmp_path / "out", log=[*STEPS, *AIMS], verdict=missed)
    assert page.verdict.outcome == BAD and page.verdict.sentences[-1] == "Raise --epochs."


def test_where_an_aim_went_back_or_was_estimated(tmp_path):
    aims = [{**AIMS[0], "exact": False, "back_to": 1}, AIMS[1]]
    text = markdown.render(page_of(tmp_path / "out", log=[*STEPS, *aims], verdict=VERDICT))
    assert "After step 2 the run went back to the weights of step 1." in text and "taken from the batches" in text


def test_where_an_earlier_point_was_saved_the_figures_are_those_of_it(tmp_path):
    verdict = {**VERDICT, "reached": False, "step": 2, "forget_prob": 0.4, "control_prob": 0.55}
    page = page_of(tmp_path / "out", log=[*STEPS, *AIMS], verdict=verdict)
    assert [figure.value for figure in page.figures[:2]] == ["0.670 → 0.400", "0.600 → 0.550"]


@pytest.mark.parametrize("forget, kept, method, outcome, words", [
    ((0.6, 0.1), (0.6, 0.59), "npo", GOOD, "the rest kept"),
    ((0.6, 0.1), (0.6, 0.5), "npo", MIXED, "at a cost"),
    ((0.6, 0.1), (0.6, 0.1), "npo", MIXED, "so was much"),
    ((0.6, 0.1), (None, None), "ga", OPEN, "not measured"),
    ((0.998, 0.992), (0.6, 0.6), "npo", BAD, "Next to nothing"),
    ((0.6, 0.4), (0.6, 0.6), "npo", BAD, "Not enough"),
    ((0.6, 0.4), (0.6, 0.4), "npo", BAD, "not kept either"),
    ((0.6, 0.6), (0.6, 0.6), "po", OPEN, "Judge by the answers"),
])  # fmt: skip
def test_without_an_aim_the_page_judges_by_its_own_measure(tmp_path, forget, kept, method, outcome, words):
    asked = [{"step": step, "texts": ["", ""], "retain_prob": value} for step, value in zip((0, 4), kept)]
    notes = {**NOTES, "forget_prob": forget, "asked": asked}
    verdict = page_of(tmp_path / "out", report=notes, soul_config={**OPTIONS, "method": method}).verdict
    assert verdict.outcome == outcome and words in verdict.headline
    assert method in REFUSING or any("No aim was given" in sentence for sentence in verdict.sentences)


REFUSING = ("po", "dpo")


def test_what_the_model_says_is_side_by_side(tmp_path):
    (samples,) = blocks(page_of(tmp_path / "out"), Samples)
    first, second = samples.samples
    assert first.answers == (("before", "Me."), ("step 2", "M"), ("after", "\x1b[1mNo"))
    assert first.notes == ("p 0.700", "p 0.300", "p 0.001") and first.expected == "Me."
    assert second.group == "General" and second.answers[1] == ("step 2", "(nothing)")
    *lines, last = report_on_run(tmp_path / "out", {"forget_prob": [0.67, 0.2]})
    assert lines[:3] == ["To be forgotten: Who <b>?", "  before: Me.", "  after:  \ufffd[1mNo"]
    assert last == f"report: {tmp_path / 'out' / 'report.html'}"
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == {**NOTES, "forget_prob": [0.67, 0.2]}
    text = (tmp_path / "out" / "report.html").read_text()
    assert "0.670 → 0.200" in text and "a/b &lt;c&gt;" in text and "Who &lt;b&gt;?" in text and "a &lt;processor&gt;" in text


def test_a_run_that_goes_on_or_was_killed(tmp_path, capsys):
    out = directory(tmp_path / "out", ended=False, data=None)
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out == f"{out / 'report.html'}\n"
    page = run_page(Run(out))
    assert page.verdict.outcome == OPEN and "is 4" in page.verdict.sentences[0]
    assert curves(page)["Probability of the answers"]["forget"] == ((0, 0.67),)  # not what the notes of another end say
    assert "○ This run has not ended" in (out / "report.md").read_text()


def test_a_run_that_diverged(tmp_path):
    page = page_of(tmp_path / "out", log=[*STEPS, {"step": 5, "loss": None}], ended=False)
    assert page.verdict.outcome == BAD and page.verdict.headline == "This run has diverged"


@pytest.mark.parametrize("files", [
    {"report": None}, {"report": [1]}, {"report": {}}, {"soul_config": None}, {"data": {"forget": 3}}, {"verdict": {}},
    {"report": {"no_samples": "The model was not asked: it has no prompts"}},
], ids=str)  # fmt: skip
def test_what_is_missing_is_left_out(tmp_path, files):
    page = page_of(tmp_path / "out", **files)
    text = markdown.render(page)
    assert "Rho" in text and "Learning" in text and ("it has no prompts" in text) == ("no prompts" in str(files))


def test_no_report_ends_a_run(tmp_path):
    out = directory(tmp_path / "out", report={**NOTES, "prompts": [{"no": "set"}]})
    (line,) = report_on_run(out)
    assert line.startswith("no report: KeyError") and not (out / "report.html").exists()
    assert report_on_run(tmp_path / "nowhere")[0].startswith("no report: FileNotFoundError")


SUMMARY = {"model_utility": 0.62, "forget_prob": 0.4, "forget_rouge": 0.5, "forget_truth_ratio": 0.7, "forget_rows": 2,
           "retain_prob": 0.9, "retain_rows": 2, "forget_min_k_auc": 0.51}  # fmt: skip


@pytest.mark.parametrize("quality, outcome", [(0.3, GOOD), (1e-20, BAD), (None, OPEN)])
def test_the_page_of_an_evaluation(quality, outcome):
    summary = SUMMARY if quality is None else {**SUMMARY, "forget_quality": quality}
    page = evaluation_page("a <b>", summary, {"forget": [("Who?", "", "Me.")]}, {"seed": 0, "json": None})
    assert page.verdict.outcome == outcome
    by_set, membership = blocks(page, Table)
    assert by_set.head == ("set", "probability", "ROUGE-L recall", "truth ratio", "rows")
    assert by_set.rows == (("forget", "0.4", "0.5", "0.7", "2"), ("retain", "0.9", "", "", "2"))
    assert membership.rows == (("Min-K%", "0.51"),)
    (samples,) = blocks(page, Samples)
    assert samples.samples[0].answers == (("the model says", "(nothing)"),) and samples.samples[0].expected == "Me."
    assert "0.62" in markdown.render(page)


@pytest.mark.parametrize("words, message", [
    (["nowhere"], "OUTPUT: expected the output directory of a run"),
    (["."], "got . without them"),
])  # fmt: skip
def test_bad_input(tmp_path, words, message, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *words]) == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
