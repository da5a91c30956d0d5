"""The tests that `pytest -m quick` leaves away."""

from __future__ import annotations

# Over about ten seconds each. Files, or tests by the start of their names.
SLOW = (
    "cli/test_plot_command.py::test_per_layer_at_many_layers",
    "cli/test_svd_command.py::test_values_agree_with_float64_numpy_on_the_real_pair",
    "docs/test_examples.py",
    "docs/test_site.py",
    "engine/test_benchmarks.py",
    "engine/test_cluster.py",
    "engine/test_cluster_trust.py",
    "files/test_hub.py::test_an_unreachable_hub",
    "merges/test_peft.py",
    "metrics/test_interference.py::test_another_basis_of_the_factors",
    "metrics/test_interference.py::test_factors_give_the_definitions",
    "metrics/test_similarity.py::test_phi_is_symmetric",
    "reproduce/test_experiment.py",
    "reproduce/test_train.py",
    "results/test_resume.py::test_killed_and_run_again",
    "results/test_resume.py::test_two_runs_into_one_directory",
    "test_campaign.py::test_a_planted_fault_is_found",
    "test_campaign.py::test_nothing_is_found_where_there_is_no_fault",
    "test_fuzz.py",
    "test_notebooks.py",
)
