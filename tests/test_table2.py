"""The paper's table on the digits: every row is a valid run, results are kept, and the report is written."""

import math
import types

import pytest

from benchmarks import table2, table2_report


def result(row, seed, frames=36, control=False, joint=0.9):
    curve = [joint] * (frames - 2)
    figures = {name: joint for name in table2_report.COLUMNS if name != "frechet"}
    figures |= {"frechet_per_quarter": [10.0, 11.0, 12.0, 13.0], "joint_per_frame": curve, "border_jump": None}
    about = {"row": row.name, "chunk": 3, "seed": seed, "frames": frames, "control": control, "rate": row.rate}
    where = {"updates": row.updates if row.few_step else None, "commit": "abc", "jax": "0", "python": "3", "seconds": 1}
    return about | where | {"figures": figures}


ALL_ROWS = (*table2.ROWS, *table2.ABLATIONS, *table2.UNDIRECTED_ROWS)
RUNS = [(row, chunk) for row in ALL_ROWS for chunk in row.chunks]


@pytest.mark.parametrize("row, chunk", RUNS, ids=[f"{row.captions}-{row.name}-{chunk}" for row, chunk in RUNS])
def test_every_row_is_a_run(row, chunk, monkeypatch):
    monkeypatch.setattr(table2, "start_of", lambda row, seed, chunk: "start")
    monkeypatch.setattr(table2, "teacher_of", lambda row: "teacher")
    config = table2.configured(row, 7, chunk)
    assert config.data.captions == row.captions
    weights = config.teacher_weights if row.few_step else config.init_weights
    assert weights == ("shipped" if row.captions == "full" else "teacher")
    assert config.seed == 7 and config.rollout.chunk == chunk
    if row.few_step:
        assert config.optimizer.lr == row.rate_of(chunk) and config.init_weights == "start"
        assert config.steps == row.updates * config.generator_every
    tuned = table2.configured(row, 7, chunk, 3e-5)
    assert not row.few_step or tuned.optimizer.lr == 3e-5


def test_seeds_share_starts_by_fives_and_the_search_has_the_first(monkeypatch, tmp_path):
    monkeypatch.setattr(table2, "RUNS", tmp_path)
    monkeypatch.setattr(table2.loop, "train", lambda config, folder: trained.append((folder.name, config.seed)))
    row, trained = next(row for row in table2.ROWS if row.name == "SF+DMD"), []
    for seed in (0, 4, *table2.TUNING_SEEDS, 5, 9, 10):
        table2.start_of(row, seed, 3)
    first, second, third = (f"start-init-chunk3{suffix}" for suffix in ("", "-seed1", "-seed2"))
    assert trained == [*[(first, 0)] * 3, *[(second, 1)] * 2, (third, 2)]


def test_undirected_rows_have_their_own_teacher_start_and_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(table2, "RUNS", tmp_path)
    trained = []

    def train(config, folder, **options):
        trained.append((config.stage, config.data.captions, config.init_weights, config.teacher_weights))
        folder.mkdir(parents=True)
        path = folder / ("teacher.safetensors" if config.stage == "teacher" else "student.safetensors")
        path.touch()
        return path

    monkeypatch.setattr(table2.loop, "train", train)
    rows = {row.name: row for row in table2.UNDIRECTED_ROWS}
    assert {"TF+DMD", "DF+DMD", "SF+DMD", "SF+DMD, write"} == set(rows)
    for _ in range(2):  # the second time, all is there
        start = table2.start_of(rows["SF+DMD"], 0, 1)
    folder = tmp_path / "undirected"
    teacher = str(folder / "teacher" / "teacher.safetensors")
    assert start == folder / "DF_DMD_start-chunk1-seed100" / "rate0.001-updates60" / "student.safetensors"
    assert trained == [
        ("teacher", "undirected", "shipped", None),
        ("init", "undirected", None, teacher),
        ("distill", "undirected", str(folder / "start-init-chunk1" / "student.safetensors"), teacher),
    ]


def test_real_clips_are_measured_once_for_each_length(monkeypatch, tmp_path):
    monkeypatch.setattr(table2, "figures_of", lambda figures: figures)
    path, measured = tmp_path / "results.jsonl", []

    def real(frames, chunk):
        measured.append((frames, chunk))
        return {"joint": 0.9}

    measure = types.SimpleNamespace(real=real)
    lengths = [(9, False), (36, False), (36, True)]
    for part in (lengths[:1], lengths, lengths):  # the first one was cut short
        table2.run_real(1, part, measure, path)
    assert measured == [(9, 1), (36, 1)]


def test_what_is_there_is_not_made_again(tmp_path):
    rows, lengths = table2.ROWS[2:4], [(36, False), (36, True)]
    path = tmp_path / "results.jsonl"
    for line in (result(rows[0], 0), result(rows[0], 0, control=True), result(rows[1], 0)):
        table2.write(path, line)
    with path.open("a") as file:
        file.write('{"row": "cut')
    left = table2.plan(rows, [0, 1], [3], lengths, table2.read(path))
    assert [(row.name, seed, todo) for row, seed, _, todo in left] == [
        ("DF+DMD", 0, [(36, True)]),
        ("TF+DMD", 1, lengths),
        ("DF+DMD", 1, lengths),
    ]
    noisy = next(row for row in table2.ABLATIONS if row.name == "noisy context")
    assert table2.plan([noisy], [0], [3], lengths, [])[0][3] == [(36, False)]  # no control


@pytest.mark.parametrize(
    "best, tried",
    [(1e-4, [3e-5, 1e-4, 3e-4]), (1e-3, [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]), (1e-5, [3e-5, 1e-4, 3e-4, 1e-5, 3e-6])],
)
def test_the_search_goes_on_at_its_edges(best, tried, monkeypatch, tmp_path):
    row, path = table2.ROWS[2], tmp_path / "results.jsonl"
    monkeypatch.setattr(table2, "start_digest", lambda row, seed, chunk: "abc")
    monkeypatch.setattr(table2, "weights_of", lambda row, seed, chunk, rate: rate)
    monkeypatch.setattr(table2, "load_pipeline", lambda rate: rate)
    monkeypatch.setattr(table2, "figures_of", lambda figures: vars(figures))

    def measure(rate, frames, seed):
        return types.SimpleNamespace(joint=1.0 - abs(math.log(rate / best)), frechet_per_quarter=[1.0], samples=1)

    for _ in range(2):  # the second time, all is there
        table2.tune(row, 100, 3, measure, path)
    assert [result["rate"] for result in table2.read(path)] == tried
    assert all(set(result["figures"]) == {"joint", "frechet_per_quarter"} for result in table2.read(path))
    older = [{k: v for k, v in result.items() if k != "start"} for result in table2.read(path)[:3]]
    path.unlink()
    for result in older:
        table2.write(path, result)
    table2.tune(row, 100, 3, measure, path)
    assert [result["rate"] for result in table2.read(path)] == tried


def test_one_run_is_measured_at_several_numbers_of_updates(monkeypatch, tmp_path):
    monkeypatch.setattr(table2, "start_of", lambda row, seed, chunk: "start")
    monkeypatch.setattr(table2, "RUNS", tmp_path)
    trained = []

    def train(config, folder, allow_config_change):
        trained.append((config.steps, folder))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "student.safetensors").touch()
        return folder / "student.safetensors"

    monkeypatch.setattr(table2.loop, "train", train)
    rows = [row for row in table2.ABLATIONS if row.name == "SF+DMD"]
    paths = [table2.weights_of(row, 0, 3) for row, *_ in table2.plan(rows, [0], [3], [(36, False)], [])]
    assert [steps for steps, _ in trained] == [2 * row.updates for row in rows] == [40, 120, 360, 720, 1440]
    assert len({folder for _, folder in trained}) == 1 and len(set(paths)) == len(rows)
    assert all(path.exists() for path in paths)
    results = [result(row, 0) for row in rows]
    names = ["SF+DMD", *(f"SF+DMD, {count} updates" for count in (180, 20, 360, 720))]
    assert list(table2_report.grouped(results)[3, 36, False]) == names


def test_the_report_has_means_and_intervals(tmp_path):
    row = table2.ROWS[4]
    outdated = result(row, 0, joint=0.1) | {"rate": 1.0}
    results = [outdated] + [result(row, seed, joint=0.9 + 0.01 * seed) for seed in range(3)]
    results += [result(row, 0, control=control) for control in (True, "first")]
    page, picture = table2_report.write(results, tmp_path / "table2.md")
    text = page.read_text()
    assert "0.910 ± 0.025" in text and "| SF+DMD | 3 |" in text and "after real frames" in text
    assert "after one real chunk" in text
    assert picture.stat().st_size > 10_000
    assert table2_report.write([], tmp_path / "none.md") == []


def test_differences_are_taken_seed_by_seed():
    rows = {row.name: row for row in table2.ROWS}
    results = [result(rows["SF+DMD"], seed, joint=0.9 + 0.02 * seed) for seed in range(3)]
    results += [result(rows["DF+DMD"], seed, joint=0.8 + 0.02 * seed) for seed in (1, 2)]
    results += [result(rows["DF+DMD"], 1, control=True, joint=0.1), result(rows["SF+SiD"], 5)]
    table = table2_report.differences(results, 3)
    assert table.splitlines()[2:] == ["| SF+DMD, less DF+DMD | 2 | +0.100 ± 0.000 | +0.0 ± 0.0 |"]
    assert table2_report.differences(results, 1) == ""


def test_the_page_of_undirected_prompts(tmp_path):
    row = next(row for row in table2.UNDIRECTED_ROWS if row.name == "SF+DMD")
    results = [result(row, seed, 9) | {"chunk": 1} for seed in range(2)]
    page, _ = table2_report.write(results, tmp_path / "undirected.md")
    text = page.read_text()
    assert "directions untold" in text and "--captions=undirected --report" in text
    assert "\n\n\n" not in text


def test_bad_arguments_are_refused(capsys):
    for arguments, message in (
        (["--rows=SF+XYZ"], "--rows has SF+XYZ"),
        (["--captions=undirected", "--chunks=3"], "--chunks has 3: no row is run with it"),
        (["--captions=undirected", "--ablations"], "--captions=undirected has neither --ablations nor --quick"),
        (["--quick", "--ablations"], "--quick has rows, seed and length of its own"),
    ):
        with pytest.raises(SystemExit):
            table2.main(arguments)
        assert message in capsys.readouterr().err
