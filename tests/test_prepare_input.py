"""Users' input to `python -m sf_jax.prepare`: prompt files, folders of videos, command lines."""

import os
import subprocess
import sys

import pytest

from sf_jax.data import captions
from sf_jax.inference import prepare_job
from sf_jax.inference.prepare_job import Job
from tests.test_commands import command


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.txt", b"\xff\xfe\xff", "cannot read .* it must be a text file in UTF-8"),
        ("p.jsonl", '{"text": "a"}\n{"text": 3}', "p.jsonl line 2: text is 3: it must be a text"),
        ("p.jsonl", '{"text": "a"}\n\n{"text"', "p.jsonl line 3 is no JSON"),
        ("p.jsonl", '["a"]', "p.jsonl line 1 is list: it must be an object"),
        (
            "p.txt",
            "a cat".encode("utf-16-le"),
            "p.txt has NUL characters: it must be a text file in UTF-8, not in UTF-16",
        ),
        ("p.json", '["a\\u0000b"]', "p.json entry 1 has a NUL character"),
        ("p.json", '["a", 3]', "p.json entry 2 is int: it must be a text or an object"),
        ("p.json", '["a",', "p.json is no JSON"),
        ("p.json", '"a"', "p.json holds str: it must hold a list"),
        ("p.json", '{"prompts": ["a"]}', "p.json has prompts: it must have prompt or caption or text"),
        ("p.json", '[{"text": "a", "text": "b"}]', "the key text is there 2 times"),
        ("p.csv", "text,text\na,b\n", "p.csv is no table .*the column text is there 2 times"),
        ("p.yaml", "- a cat\n", "p.yaml is .yaml: give a text a line, or .csv"),
        ("p.csv", "id,name\n1,a\n", "p.csv row 1 has id, name: it must have prompt or caption or text"),
    ],
)
def test_bad_prompt_files_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        captions.read_prompts(path)


def test_prompts_are_lines_without_duplicates(tmp_path):
    (tmp_path / "p.txt").write_text("\ufeffa cat\r\n\r\n a\u2028dog \na cat\n", encoding="utf-8")
    assert captions.read_prompts(tmp_path / "p.txt") == (["a cat", "a\u2028dog"], 1)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.json", '[\n  "a cat",\n  "a, dog"\n]'),
        ("p.json", '[{"text": "a cat", "id": 1}, {"id": 2, "text": "a, dog"}]'),
        ("p.JSON", '{"prompt": "a cat"}\n{"prompt": "a, dog"}\n'),
        ("p.ndjson", '{"caption": "a cat"}\n\n{"caption": "a, dog"}'),
        ("p.tsv", "id\tprompt\n1\ta cat\n2\ta, dog\n"),
        ("p.csv", 'id, prompt\n1,a cat\n2,"a, dog"\n'),
    ],
)
def test_prompts_of_tables(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert captions.read_prompts(tmp_path / name) == (["a cat", "a, dog"], 0)


def test_generate_reads_prompts_as_prepare_does(tmp_path):
    (tmp_path / "p.csv").write_text("name,prompt\na,a cat\nb,a cat\n")
    script = """
import sys
from absl import flags
from sf_jax import generate
flags.FLAGS(sys.argv)
generate.batch.run = lambda job, executables: [repr((job.prompts, job.names))]
generate.main()
"""
    arguments = [f"--{name}={tmp_path / 'p.csv'}" for name in ("prompts", "names")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert "(('a cat', 'a cat'), ('a', 'b'))" in done.stdout, done.stderr


def test_tables_as_spreadsheets_write_them(tmp_path):
    prompts = ['a cat, in the "snow"', "a dog\nruns"]
    for name, mark in (("comma", ","), ("semicolon", ";"), ("tab", "\t")):
        text = f'\ufeffid{mark}prompt\r\n1{mark}"a cat, in the ""snow"""\r\n2{mark}"a dog\r\nruns"\r\n{mark}\r\n'
        (tmp_path / f"{name}.csv").write_bytes(text.encode())
        assert captions.read_prompts(tmp_path / f"{name}.csv") == (prompts, 0)
    (tmp_path / "bare.csv").write_text("prompt\na cat\na dog, in the snow\n")
    with pytest.raises(ValueError, match=r"bare\.csv row 2 has more cells than the header"):
        captions.read_prompts(tmp_path / "bare.csv")


def test_text_and_names_that_are_no_unicode(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": "a cat \\ud83d"}\n{"text": "a dog \\ud83d\\ude00"}\n')
    assert captions.read_prompts(tmp_path / "p.jsonl")[0] == ["a cat \ufffd", "a dog \U0001f600"]
    for stem in (b"good", b"\xd1\xa9\xb5\xd8"):  # the second one is GBK
        for suffix in (b".mp4", b".txt"):
            with open(os.path.join(os.fsencode(tmp_path), stem + suffix), "w") as file:
                file.write("a cat")
    videos, _ = captions.find_videos(tmp_path)
    assert [video.name for video in videos] == ["good.mp4", "\u0469\\xb5\\xd8.mp4"]
    assert all(video.path.is_file() for video in videos)


def test_frames_are_sorted_by_the_numbers_in_their_names(tmp_path):
    names = [
        "1.png",
        "1\u00b22.png",
        "02.png",
        "2.png",
        "10.png",
        "9" * 200 + ".png",
        "\u0663.png",
        "a1.png",
        "a.b.png",
    ]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    frames = [file.name for file in captions.Video("v", tmp_path, "a cat").frames()]
    assert sorted(frames) == sorted(names)
    order = ["1.png", "02.png", "2.png", "10.png", "9" * 200 + ".png"]
    assert [name for name in frames if name in order] == order


def test_bad_video_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="videos: .* is no folder"):
        captions.find_videos(tmp_path / "none")
    with pytest.raises(ValueError, match="has no video .*and no folder of images"):
        captions.find_videos(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.mp4").write_bytes(b"")
    (tmp_path / "sub" / "thumbnail.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 of 1 videos in .* have no caption \(sub/a.mp4\)"):
        captions.find_videos(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\nsub/a.mp4,a cat\nb.mp4,a dog\n")
    with pytest.raises(ValueError, match=r"1 files that .*metadata.csv names are not there \(b.mp4\)"):
        captions.find_videos(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\nsub/a.mp4, \n")
    with pytest.raises(ValueError, match="metadata.csv row 1 lacks a caption"):
        captions.find_videos(tmp_path)


def test_all_kinds_are_looked_for_and_others_are_named(tmp_path):
    kinds = ("mp4", "ts", "mpg", "MPEG", "m2ts", "ogv", "flv", "y4m", "gif")
    for name in [*(f"{kind}.{kind}" for kind in kinds), "a.wmv", "README.md"]:
        (tmp_path / name).write_bytes(b"")
        (tmp_path / name).with_suffix(".txt").write_text("a cat")
    for kind in ("tif", "tiff", "avif", "png"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / f"1.{kind}").write_bytes(b"")
        (tmp_path / kind / "1.txt").write_text("of a frame, not of a video")
        (tmp_path / f"{kind}.txt").write_text("a dog")
    videos, note = captions.find_videos(tmp_path)
    assert {video.name for video in videos} == {f"{kind}.{kind}" for kind in kinds} | {"tif", "tiff", "avif", "png"}
    assert note == "2 files beside the videos are no videos of a known kind (README.md, a.wmv)"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file_name,text\n/etc/passwd,a\n", "row 1: file_name is '/etc/passwd': it must be in the folder"),
        ("file_name,text\na.mp4,a\n../b.mp4,a\n", "row 2: file_name is '../b.mp4': it must be in the folder"),
        ("file_name,text\nsub/../../b.mp4,a\n", "it must be in the folder"),
        ("file_name,text\n.,a\n", "it must be in the folder"),
        ("file_name,text,text\na.mp4,a,b\n", "the column text is there 2 times"),
        ("file_name,text\n" + "x" * 300 + ",a\n", "1 files that .*metadata.csv names are not there"),
    ],
)
def test_metadata_of_other_places_is_refused(tmp_path, table, message):
    folder = tmp_path / "videos"
    folder.mkdir()
    for path in (folder / "a.mp4", tmp_path / "b.mp4"):
        path.write_bytes(b"")
    (folder / "metadata.csv").write_text(table)
    with pytest.raises(ValueError, match=message):
        captions.find_videos(folder)
    (folder / "metadata.csv").write_text(f"file_name,text\n{folder}/a.mp4,a\n./a.mp4,b\n")
    videos, note = captions.find_videos(folder)
    assert [video.name for video in videos] == ["a.mp4", "a.mp4"] and note == ""


def test_a_share_that_is_gone_ends_the_command(tmp_path):
    video = captions.Video("a.mp4", tmp_path / "a.mp4", "a cat")
    with pytest.raises(OSError, match=r"a.mp4 was there and no longer is \(No such file.*run this again to continue"):
        list(prepare_job._clips(Job(model="m", output="o", videos="v"), [video]))


def test_videos_are_found_behind_links_and_not_in_hidden_folders(tmp_path):
    for place in ("in/a", "out/b", "in/.trash/c", "in/own/d"):
        path = tmp_path / f"{place}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        path.with_suffix(".txt").write_text("a cat")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out", target_is_directory=True)
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in" / "own", target_is_directory=True)
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in", target_is_directory=True)
    videos, note = captions.find_videos(tmp_path / "in")
    assert [video.name for video in videos] == ["a.mp4", "link/b.mp4", "own/d.mp4"] and note == ""


def test_texts_that_belong_together_have_no_gaps(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("one\n\ntwo\n\n")
    assert captions.read_texts(path, "names") == ["one", "two"]
    with pytest.raises(ValueError, match="names: .*names.txt: text 2 is blank, so it is unclear which prompt"):
        captions.read_texts(path, "names", paired=True)
    path.write_text("one\ntwo\n\n")
    assert captions.read_texts(path, "names", paired=True) == ["one", "two"]


def test_names_do_not_steer_the_terminal(tmp_path, capsys):
    video = captions.Video("a\x1b]0;x\x07.mp4", tmp_path / "a\x1b]0;x\x07.mp4", "a cat")
    video.path.write_bytes(b"")
    assert not list(prepare_job._clips(Job(model="m", output="o", videos="v"), [video]))
    printed = capsys.readouterr()
    assert "\\x1b]0;x\\x07.mp4" in printed.out + printed.err and "\x1b]0" not in printed.out + printed.err
    with pytest.raises(ValueError, match=r"have no caption \(a\\x1b\]0;x\\x07.mp4\)"):
        captions.find_videos(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "must have a value"),
        (["--model=m", "--output=o"], "prompts and videos: give one of them"),
        (["--model=m", "--output=o", "--prompts=p", "--frames=3"], "frames changes nothing here: it is for --videos"),
        (["--model=m", "--output=o", "--prompts=p", "--process_index=1"], "process_count: give both or none"),
        (["--model=m", "--output=o", "--prompts=p"], "model folder m does not exist"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    done = command(*arguments, module="sf_jax.prepare")
    assert done.returncode and message in done.stderr and done.stderr.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "dtype is 'float16': it must be one of bfloat16, float32"),
        ({"height": 100}, "height is 100: it must be a multiple of 16, such as 96"),
        ({"frames": 0}, "frames is 0: it must be at least 1"),
        ({"clips_per_video": 0}, "clips_per_video is 0"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"fps": 1e9}, "fps is 1000000000.0: it must be above 0 and at most 240"),
        ({"frames": 10**12}, "frames is 1000000000000: it must be at most 1024"),
        ({"height": 16 * 10**9}, "height is 16000000000: it must be at most 8192"),
        ({"clips_per_video": 10**9}, "clips_per_video is 1000000000: it must be at most 10000"),
        (
            {"frames": 1024, "height": 4096, "width": 4096},
            "a clip would have 192 GiB of pixels, it must have at most 8",
        ),
        ({"prompts": ""}, "prompts is empty"),
        ({"process_index": 2, "process_count": 2}, "process_index is 2: it must be in"),
    ],
)
def test_jobs_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Job(**{"model": "m", "output": "o", "prompts": "p"} | changes)
