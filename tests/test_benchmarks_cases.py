"""What to measure: configuration files, options, and one clear line for each wrong value."""

import pytest

from benchmarks.__main__ import main
from benchmarks.cases import CONFIGS, Bench, Model

BENCHES = sorted(path.name for path in CONFIGS.glob("bench_*.toml"))


@pytest.mark.parametrize("name", BENCHES)
def test_configs_are_valid(name):
    bench = Bench.from_toml(CONFIGS / name)
    assert "alphafold" in bench.peers or bench.pair_rank  # AF2 takes no factors
    assert bench.sizes == tuple(sorted(bench.sizes))


def test_there_are_the_configs_that_the_readme_names():
    assert {"bench_full.toml", "bench_gpu.toml", "bench_quick.toml"} <= set(BENCHES)


def test_overrides_replace_what_the_file_says():
    bench = Bench.from_toml(CONFIGS / "bench_quick.toml", sizes=(3,), peers=())
    assert bench.sizes == (3,)
    assert bench.peers == ()
    assert bench.modes == ("forward", "grad")
    assert bench.what == ("module", "structure_module")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("sizes", [], "must not be empty"),
        ("sizes", [16, 0], "at least 1, got 0"),
        ("sizes", [16.0], "must be integers"),
        ("sizes", [True], "must be integers"),
        ("sizes", 16, "must be a list"),
        ("what", ["modul"], "unknown 'modul', known are core, module, structure_module"),
        ("modes", [], "must not be empty"),
        ("modes", ["backward"], "known are forward, grad"),
        ("implementations", ["fast"], "known are reference"),
        ("peers", ["boltz"], "known are alphafold"),
        ("devices", [0], "at least 1, got 0"),
        ("dtype", "float16", "known are float32, bfloat16"),
        ("repeats", 0, "at least 1"),
        ("float64_max_size", -1, "at least 0"),
        ("min_sample_ms", -0.5, "at least 0"),
        ("min_sample_ms", "1", "must be a number"),
        ("seed", "x", "must be integers"),
        ("model", "af3", "known are af2_monomer"),
    ],
)
def test_wrong_values_name_the_field(field, value, expected):
    with pytest.raises(ValueError, match=rf"^{field}: ") as error:
        Bench(**{"sizes": (16,), field: value})
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"what": ("structure_module",), "model": "af2_multimer"}, "what: .* needs a monomer"),
        ({"what": ("structure_module",), "dtype": "bfloat16"}, "what: .* takes float32 only"),
        ({"implementations": (), "peers": ()}, "implementations: there is nothing"),
        ({"pair_rank": 1}, "pair_rank: must be 0 with peers"),
        ({"pair_rank": 1, "peers": (), "what": ("structure_module",)}, "what: .* takes arrays"),
    ],
)
def test_values_that_do_not_go_together(fields, expected):
    with pytest.raises(ValueError, match=expected):
        Bench(sizes=(16,), **fields)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[bench\n", "is not TOML"),
        ("[other]\n", "has no [bench] table"),
        ("[bench]\nsizes = [4]\nsize = 4\n", "unknown size"),
        ("[bench]\nrepeats = 3\n", "sizes is missing"),
    ],
)
def test_wrong_files_are_named(tmp_path, text, expected):
    path = tmp_path / "bench_mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bench_mine\.toml") as error:
        Bench.from_toml(path)
    assert expected in str(error.value)


def test_model_reads_the_sizes_of_its_file():
    model = Model.from_name("af2_multimer")
    assert (model.variant, model.position_scale, model.single_channel) == ("multimer", 20.0, 384)
    assert model.ipa.num_head == 12
    assert model.alphafold == "alphafold_multimer"
    assert Model.from_name("af2_monomer").alphafold == "alphafold"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--sizes", "16,x"], "argument --sizes: invalid integers value: '16,x'"),
        (["--sizes", "-4"], "sizes: must be integers of at least 1, got -4"),
        (["--sizes", "0"], "sizes: must be integers of at least 1, got 0"),
        (["--implementations", "fast"], "implementations: unknown 'fast'"),
        (["--peers", "boltz"], "peers: unknown 'boltz'"),
        (["--modes", "backward"], "modes: unknown 'backward'"),
        (["--what", "all"], "what: unknown 'all'"),
        (["--dtype", "half"], "dtype: unknown 'half'"),
        (["--pair-rank", "-1"], "pair_rank: must be integers of at least 0, got -1"),
        (["--repeats", "many"], "invalid int value: 'many'"),
        (["--margin", "-1"], "argument --margin: invalid fraction value: '-1'"),
        (["--margin", "nan"], "argument --margin: invalid fraction value: 'nan'"),
        (["--config", "no.toml"], "no.toml"),
        (["--structure", "no.pdb"], "no such file: no.pdb"),
        (["--openfold", "nowhere"], "nowhere is no checkout of OpenFold"),
        (["--flash-ipa", "nowhere"], "nowhere is no checkout of FlashIPA"),
        (["--out", "nowhere/x.json"], "there is no such directory"),
        (["--plot", "figure.xyz"], "unknown format"),
        (["--compare", "no.json"], "no.json"),
        (["--update-readme", "NO.md"], "NO.md"),
        (["--cost", "--from-json", "x.json"], "not allowed with"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_wrong_options_give_one_line(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    output = capsys.readouterr()
    assert exit_.value.code == 2
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert expected in output.err


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    options = (
        "config model sizes implementations peers openfold flash-ipa modes what dtype pair-rank "
        "devices repeats seed "
        "structure chain cost out plot compare margin update-readme from-json"
    )
    for option in options.split():
        assert f"--{option} " in text
