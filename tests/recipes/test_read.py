from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from dino_adapters.contracts import RecipeError
from dino_adapters.recipes.data import DataRecipe
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.recipes.read import read_recipe, read_value, split_override

HERE = ["data.source=photos"]


class Inner(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    rate: float = 1.0
    name: str = "x"
    pair: tuple[int, int] = (1, 2)


class Outer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    inner: Inner = Inner()
    maybe: Inner | None = None
    steps: int = 10
    quick: bool = False
    names: tuple[str, ...] | None = None
    free: dict[str, object] = {}


def refusal(*overrides: str, path: Path | None = None, kind: type[BaseModel] = Outer) -> str:
    with pytest.raises(RecipeError) as caught:
        read_recipe(path, kind, overrides)
    return str(caught.value)


class TestReadValue:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("3e-4", 3e-4),
            ("7", 7),
            ("-1.5", -1.5),
            ("true", True),
            ("False", False),
            ("none", None),
            ("null", None),
            ("[1, 2]", [1, 2]),
            ("(0.1, 0.9)", (0.1, 0.9)),
            ("'2024'", "2024"),
            ("runs/a/export", "runs/a/export"),
            (r"C:\images\new", r"C:\images\new"),
            ("[red,green, nir]", ["red", "green", "nir"]),
            ("(a,1,true,)", ["a", 1, True]),
            ("[]", []),
            ("", ""),
            ("[", "["),
            ("[a[0],b]", "[a[0],b]"),
            ("{'k': 5}", {"k": 5}),
            ("__import__('os')", "__import__('os')"),
            ("(" * 500, "(" * 500),
        ],
    )
    def test_values(self, text: str, value: object):
        read = read_value(text)
        assert read == value
        assert type(read) is type(value)

    @settings(deadline=None, derandomize=True, max_examples=200)
    @given(
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(),
            lambda inner: (
                st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3)
            ),
            max_leaves=8,
        )
    )
    def test_round_trip_of_literals(self, value: object):
        assert read_value(repr(value)) == value

    @settings(deadline=None, derandomize=True, max_examples=200)
    @given(st.text())
    def test_any_text_is_some_value(self, text: str):
        read_value(text)

    @settings(deadline=None, derandomize=True)
    @given(
        st.lists(st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True), min_size=1, max_size=4),
        st.text(),
    )
    def test_overrides_split_at_the_first_equals_sign(self, names: list[str], text: str):
        assert split_override(f"{'.'.join(names)}={text}") == (tuple(names), text)


class TestOverrides:
    def test_they_reach_their_places(self):
        made = read_recipe(
            None,
            Outer,
            ["inner.rate=3e-4", "steps=5", "quick=true", "names=[a,b]", "inner.pair=[3,4]"],
        )
        assert made.inner == Inner(rate=3e-4, pair=(3, 4))
        assert (made.steps, made.quick, made.names) == (5, True, ("a", "b"))

    def test_the_last_one_wins(self):
        assert read_recipe(None, Outer, ["steps=1", "steps=2"]).steps == 2

    @settings(deadline=None, derandomize=True)
    @given(
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(st.characters(codec="utf-8")),
        st.integers(),
        st.tuples(st.integers(), st.integers()),
        st.booleans(),
    )
    def test_round_trip(self, rate: float, name: str, steps: int, pair: tuple, quick: bool):
        wanted = Outer(inner=Inner(rate=rate, name=name, pair=pair), steps=steps, quick=quick)
        overrides = [
            f"inner.rate={rate!r}",
            f"inner.name={name!r}",
            f"inner.pair={pair!r}",
            f"steps={steps!r}",
            f"quick={quick!r}",
        ]
        assert read_recipe(None, Outer, overrides) == wanted

    @pytest.mark.parametrize("text", ["2024", "1e3", "true", "none", "3,5", "[1,2]"])
    def test_text_that_looks_like_something_else_stays_text(self, text: str):
        made = read_recipe(None, Outer, [f"inner.name={text}", "steps=3"])
        assert made.inner.name == text
        assert made.steps == 3

    def test_optional_and_free_sections(self):
        made = read_recipe(None, Outer, ["maybe.rate=2", "free.k=20"])
        assert made.maybe == Inner(rate=2.0)
        assert made.free == {"k": 20}

    @pytest.mark.parametrize("word", ["none", "None", '"none"'])
    def test_none_is_a_choice_where_it_is_one(self, word: str):
        told = [*HERE, f"optim.lr_rule={word}", f"objective.regularizer={word}", f"gram={word}"]
        if word == '"none"':
            assert "'gram'" in refusal(*told, kind=PretrainRecipe)
            told.pop()
        made = read_recipe(None, PretrainRecipe, told)
        assert (made.optim.lr_rule, made.objective.regularizer) == ("none", "none")
        assert made.gram is None

    @pytest.mark.parametrize("override", ["steps", "=3", "inner..rate=3", ".=1", ""])
    def test_no_setting_is_refused(self, override: str):
        assert f"'{override}' is no setting" in refusal(override)

    def test_parts_of_a_value_are_refused(self):
        assert "which is the value 3 and has no parts" in refusal("steps=3", "steps.x=4")


class TestErrors:
    def test_unknown_names_get_the_nearest(self):
        assert "There is no setting 'inner.rat'. Did you mean 'inner.rate'?" in refusal(
            "inner.rat=1"
        )
        assert "There is no setting 'stpes'. Did you mean 'steps'?" in refusal("stpes=1")
        assert "Did you mean 'inner.pair'?" in refusal("pair=1")
        assert "'maybe.nome'. Did you mean 'maybe.name'?" in refusal("maybe.nome=1")
        assert "Known: free, inner" in refusal("zzzzzz=1")

    def test_wrong_values_are_shown_with_what_is_allowed(self):
        text = refusal("steps=many", "inner.rate=[1]")
        assert "'steps' is 'many'; input should be a valid integer" in text
        assert "'inner.rate' is [1]; input should be a valid number" in text

    def test_rules_across_settings_come_as_they_are_written(self):
        text = refusal("data.source=x", "data.value_range=[5,1]", kind=PretrainRecipe)
        assert "data: value_range is (5.0, 1.0). Give the file value that means 0" in text
        assert "Value error" not in text

    def test_missing_settings_are_explained(self):
        text = refusal("data.labels=folder", kind=PretrainRecipe)
        assert "'data.source' is missing (A folder" in text
        assert "data.source=..." in text

    def test_long_lists_are_cut(self):
        text = refusal(*[f"unknown{number}=1" for number in range(9)])
        assert text.count("There is no setting") == 5
        assert text.endswith("And 4 more.")


class TestFiles:
    def test_python_yaml_and_json_are_the_same(self, tmp_path: Path):
        (tmp_path / "a.py").write_text(
            "_half = 2\ninner = dict(rate=3e-4, pair=[3, 4])\nsteps = _half * 2\n"
        )
        (tmp_path / "a.yaml").write_text("inner: {rate: 3e-4, pair: [3, 4]}\nsteps: 4\n")
        (tmp_path / "a.json").write_text('{"inner": {"rate": 3e-4, "pair": [3, 4]}, "steps": 4}')
        made = [read_recipe(tmp_path / f"a.{end}", Outer, []) for end in ("py", "yaml", "json")]
        assert made[0] == made[1] == made[2] == Outer(inner=Inner(rate=3e-4, pair=(3, 4)), steps=4)

    def test_precedence(self, tmp_path: Path):
        (tmp_path / "base.py").write_text("inner = dict(rate=2.0, name='base')\nsteps = 2\n")
        (tmp_path / "a.py").write_text("_base_ = ['base.py']\ninner = dict(name='file')\n")
        made = read_recipe(tmp_path / "a.py", Outer, ["inner.pair=[8,9]"])
        assert made.inner == Inner(rate=2.0, name="file", pair=(8, 9))
        assert (made.steps, made.quick) == (2, False)

    def test_absent_files_get_the_nearest(self, tmp_path: Path):
        (tmp_path / "smoke.py").write_text("")
        assert f"Did you mean {tmp_path / 'smoke.py'}?" in refusal(path=tmp_path / "smoek.py")
        assert "There is no folder" in refusal(path=tmp_path / "no" / "smoke.py")
        assert "ends in '.txt'" in refusal(path=tmp_path / "a.txt")

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("a.py", "steps = 1 +"),
            ("a.py", "raise KeyError('x')"),
            ("a.yaml", "a: [1"),
            ("a.json", "{"),
            ("a.py", "_base_ = ['gone.py']"),
        ],
    )
    # mmengine leaves its temporary copy of a broken file open; that shows when it is collected.
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_broken_files_are_refused(self, tmp_path: Path, name: str, text: str):
        (tmp_path / name).write_text(text)
        assert f"The recipe {tmp_path / name} cannot be read" in refusal(path=tmp_path / name)
        gc.collect()

    def test_errors_name_the_file(self, tmp_path: Path):
        (tmp_path / "a.py").write_text("stepz = 3\n")
        text = refusal(path=tmp_path / "a.py")
        assert str(tmp_path / "a.py") in text
        assert "Did you mean 'steps'?" in text


class TestPlainFiles:
    """YAML and JSON recipes are values: nothing in them runs."""

    @pytest.fixture
    def payload(self, tmp_path: Path) -> str:
        return f'x: !!python/object/apply:os.system ["touch {tmp_path / "ran"}"]\n'

    @pytest.fixture(autouse=True)
    def nothing_runs(self, tmp_path: Path):
        yield
        assert not (tmp_path / "ran").exists()

    def test_the_payload_would_run(self, payload: str, tmp_path: Path):
        """Otherwise the tests below would prove nothing."""
        import mmengine

        (tmp_path / "a.yaml").write_text(payload)
        mmengine.load(tmp_path / "a.yaml")
        assert (tmp_path / "ran").exists()
        (tmp_path / "ran").unlink()

    @pytest.mark.parametrize("name", ["a.yaml", "a.yml", "a.YAML"])
    def test_tags_are_refused(self, payload: str, tmp_path: Path, name: str):
        (tmp_path / name).write_text(payload)
        text = refusal(path=tmp_path / name)
        assert f"The recipe {tmp_path / name} holds more than plain values" in text
        assert "os.system" in text

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("a.yaml", "_base_: inner/b.yaml\n"),
            ("a.yaml", "_base_: [inner/c.yaml]\n"),
            ("a.yaml", "{_base_: ./inner/../inner/b.yaml}\n"),
            ("a.json", '{"_base_": ["inner/c.yaml"]}'),
            ("a.py", "_base_ = ['inner/c.yaml']\n"),
        ],
    )
    def test_tags_in_bases_are_refused(self, payload: str, tmp_path: Path, name: str, text: str):
        (tmp_path / "inner").mkdir()
        (tmp_path / "inner" / "b.yaml").write_text(payload)
        (tmp_path / "inner" / "c.yaml").write_text("_base_: b.yaml\nsteps: 3\n")
        (tmp_path / name).write_text(text)
        told = refusal(path=tmp_path / name)
        assert f"The recipe {tmp_path / 'inner' / 'b.yaml'} holds more than plain values" in told

    @pytest.mark.parametrize("name", ["a.yaml", "a.json"])
    def test_code_as_a_base_is_refused(self, tmp_path: Path, name: str):
        (tmp_path / "b.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
        (tmp_path / "c.yaml").write_text("_base_: b.py\n")
        for base in ("b.py", "c.yaml", "mmdet::b.py"):
            (tmp_path / name).write_text(f'{{"_base_": "{base}"}}')
            assert "names 'b.py'" in (text := refusal(path=tmp_path / name)) or base in text
            assert "in _base_, which is code" in text

    def test_a_python_recipe_may_name_both(self, tmp_path: Path):
        (tmp_path / "b.py").write_text("inner = dict(rate=2.0)\n")
        (tmp_path / "c.yaml").write_text("_base_: b.py\nsteps: 3\n")
        (tmp_path / "a.py").write_text("_base_ = 'c.yaml'\nquick = True\n")
        made = read_recipe(tmp_path / "a.py", Outer, [])
        assert (made.inner.rate, made.steps, made.quick) == (2.0, 3, True)

    def test_plain_bases_are_read(self, tmp_path: Path):
        (tmp_path / "b.yml").write_text("inner: {rate: 2.0, name: base}\nsteps: 3\n")
        (tmp_path / "c.json").write_text('{"_base_": "b.yml", "inner": {"name": "file"}}')
        (tmp_path / "a.yaml").write_text("_base_: c.json\nquick: true\n")
        made = read_recipe(tmp_path / "a.yaml", Outer, [])
        assert made == Outer(inner=Inner(rate=2.0, name="file"), steps=3, quick=True)

    def test_text_that_mmengine_would_replace_is_refused(
        self, payload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        """Such text is plain for the check and becomes a tag afterwards."""
        monkeypatch.setenv("SNEAKED", f"z'\n{payload.strip()} #")
        (tmp_path / "a.yaml").write_text("y: '{{$SNEAKED:z}}'\n")
        assert "holds '{{'" in refusal(path=tmp_path / "a.yaml")

    def test_circles_end(self, tmp_path: Path):
        (tmp_path / "a.yaml").write_text("_base_: a.yaml\n")
        assert "itself" in refusal(path=tmp_path / "a.yaml")


class TestBounds:
    @pytest.mark.parametrize(
        "override",
        [
            "optim.betas=[0.9,1.0]",
            "optim.betas=[-0.1,0.9]",
            "optim.weight_decay=[-0.1,0.4]",
            "schedule.momentum=[0.9,1.1]",
            "schedule.momentum=[-0.1,1]",
            "schedule.warmup=1.1",
            "masks.ratio=[0.1,1.1]",
            "masks.ratio=[-0.1,0.5]",
            "masks.ratio=[0.5,0.1]",
            "masks.probability=2",
            "crops.blur=[0,0.5,1.5]",
            "crops.blur=[0,-0.5,0.5]",
            "crops.blur_sigma=[0,1]",
            "crops.blur_sigma=[2,1]",
            "crops.global_scale=[0,1]",
            "crops.global_scale=[0.9,0.1]",
            "crops.local_scale=[0.1,1.2]",
            "crops.jitter=-1",
            "objective.teacher_temperature=[0,0.07]",
            "objective.teacher_temperature=[0.04,-1]",
            *(f"{name}=1e999" for name in ("optim.lr", "optim.clip", "objective.dino_weight")),
            "optim.weight_decay=[0,1e999]",
            "crops.blur_sigma=[0.1,1e999]",
            "data.value_range=[0,1e999]",
            "data.value_range=[nan,1]",
            "data.memory_gb=1e999",
            "schedule.momentum=[nan,1]",
        ],
    )
    def test_what_makes_no_sense_is_refused(self, override: str):
        name = override.partition("=")[0]
        text = refusal(*HERE, override, kind=PretrainRecipe)
        assert name.rpartition(".")[2] in text
        assert name.partition(".")[0] in text

    @pytest.mark.parametrize(
        "override",
        [
            "optim.betas=[0,0.999]",
            "optim.weight_decay=[0,0]",
            "schedule.momentum=[0,1]",
            "masks.ratio=[0,1]",
            "masks.ratio=[0.3,0.3]",
            "crops.blur=[0,1,0.5]",
            "crops.blur_sigma=[1,1]",
            "objective.teacher_temperature=[0.07,0.04]",
            "data.value_range=[-1000,3000]",
            "model.architecture.depth=6",
        ],
    )
    def test_the_edges_are_allowed(self, override: str):
        read_recipe(None, PretrainRecipe, [*HERE, override])


def test_pretrain_recipes_are_read():
    made = read_recipe(None, PretrainRecipe, [*HERE, "optim.lr=3e-4", "crops.local_count=6"])
    assert made.data == DataRecipe(source="photos")
    assert math.isclose(made.optim.lr, 3e-4)
    assert made.crops.local_count == 6


def test_the_room_opens_without_torch():
    code = (
        "import sys, dino_adapters.recipes.read, dino_adapters.recipes.task;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


PHASED = {"data": {"source": "x"}, "phases": [{"name": "a", "steps": 2}, {"name": "b"}]}


def test_a_word_changes_one_setting_of_one_phase(tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(PHASED))
    words = ["phases.b.steps=7", "phases.b.optim.lr=0.5", "phases.a.gram=null"]
    plans = [plan for _, plan in read_recipe(file, PretrainRecipe, words).plans()]
    assert [plan.steps for plan in plans] == [2, 7]
    assert [plan.optim.lr for plan in plans] == [1e-3, 0.5]


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("phases.c.steps=7", "'phases.c.steps=7' names 'c'. There are a, b"),
        ("phases.steps=7", r"sets a part of phases, a list. Write phases.NAME.SETTING=\.\.\."),
        ("phases.a.steps.more=7", "phases.a.steps, which is the value 2 and has no parts"),
    ],
)
def test_words_that_name_no_setting_of_a_phase_are_refused(tmp_path, word, sentence):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(PHASED))
    with pytest.raises(RecipeError, match=sentence):
        read_recipe(file, PretrainRecipe, [word])
