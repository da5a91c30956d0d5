"""`spectra alignment` as a user meets it."""

from __future__ import annotations

from support.command_line import lora_folder, run, strict, table

COLUMNS = [
    "name", "k", "intruders", "largest_cosines", "amplification", "amplification_own", "amplification_random",
    "left_in_top", "right_in_top", "left_chance", "right_chance", "left_deciles", "right_deciles",
]  # fmt: skip


def test_the_table_fits_a_terminal_and_its_chance_levels_are_beside_it(llama):
    out, err = run("alignment", "--base", "llama-7b", "--tuned", "ckpt", "--layer", "self_attn", "--k", 3)
    assert out.splitlines()[0].split() == ["matrix", "intruders", "amplified", "left", "right"]
    assert max(map(len, out.splitlines())) <= 80
    assert "by chance" in err
    assert "in random directions" in err


def test_many_matrices_are_told_by_role(llama):
    out, err = run("alignment", "--base", "llama-7b", "--tuned", "ckpt")
    assert "v_proj" in out
    assert "medians" in err


def test_json_is_strict_and_kept_with_the_table(llama):
    lora_folder(llama / "lora", seed=1)
    arguments = ["alignment", "--base", "llama-7b", "--tuned", "lora", "--k", 3, "--cache", "kept", "--out", "found"]
    out, err = run(*arguments, "--json")
    document = strict(out)
    assert strict((llama / "found/alignment.json").read_text()) == document
    assert "found/alignment.csv" in err
    for row in document["matrices"]:
        assert set(COLUMNS) <= set(row)
        assert len(row["largest_cosines"]) == row["k"] == 3
        assert (len(row["left_deciles"]), len(row["right_deciles"])) == (10, 10)
    assert [row["name"] for row in table(llama / "found/alignment.csv")] == [r["name"] for r in document["matrices"]]
    assert len(list((llama / "kept").iterdir())) == 2


def test_a_missing_base_is_one_message(llama):
    lora_folder(llama / "lora", seed=1)
    _, err = run("alignment", "--tuned", "lora", status=1)
    assert "pass base= (--base)" in err


def test_workers_give_the_same_and_out_draws_what_plot_draws_again(llama):
    arguments = ["alignment", "--base", "llama-7b", "--tuned", "ckpt", "--k", 3]
    plain, _ = run(*arguments, "--json", "--out", "plain", "--no-figures")
    out, err = run(*arguments, "--json", "--workers", 2, "--cache", "kept", "--out", "found")
    assert strict(out)["matrices"] == strict(plain)["matrices"]
    names = {f"alignment_{what}.{kind}" for what in ("cosines", "deciles") for kind in ("png", "pdf", "csv")}
    assert names <= {path.name for path in (llama / "found").iterdir()}
    assert "not drawn, to keep the figure readable" in err, "nine roles are there"
    assert {path.name for path in (llama / "plain").iterdir()} == {"alignment.csv", "alignment.json"}
    printed, _ = run("plot", "plain", "--layer", "q_proj")
    assert {line.split("/")[-1] for line in printed.split()} == names
    assert {row["role"] for row in table(llama / "plain/alignment_deciles.csv")} == {"q_proj"}
