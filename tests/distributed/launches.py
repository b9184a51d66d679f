"""Launches of several processes: each check runs on all ranks of one launch for each world size."""

import multiprocessing
import os
import time
import traceback
import warnings
from datetime import timedelta

import check_checkpoints
import check_equivalence
import check_faults
import check_side_effects
import torch
import torch.distributed as dist

SECONDS = 120
"""After this long a launch has hung, even beside other work."""

MOVES = check_checkpoints.check_a_checkpoint_moves_to_another_number_of_ranks
FOUR_ALONE = {
    check_equivalence.check_two_dimensions_equal_one_process,
    check_equivalence.check_groups_train_by_themselves,
}
FOUR = FOUR_ALONE | {
    check_equivalence.check_ddp_equals_one_process,
    check_equivalence.check_fsdp_equals_one_process,
    check_equivalence.check_tensor_parallel_equals_one_process,
    check_faults.check_a_non_finite_loss_on_one_rank,
    check_faults.check_a_gradient_in_one_shard_moves_all_ranks,
    check_faults.check_uneven_data_through_a_sampler,
    check_faults.check_a_rank_without_data_steps_on_a_loss_of_zero,
    check_faults.check_joining_stops_all_ranks_together,
    check_side_effects.check_what_is_sent,
}
CHECKS = {
    name.removeprefix("check_"): function
    for module in (check_equivalence, check_side_effects, check_faults, check_checkpoints)
    for name, function in vars(module).items()
    if name.startswith("check_")
}
LAUNCHES = {
    "2": (2, {name: run for name, run in CHECKS.items() if run not in FOUR_ALONE | {MOVES}}),
    "4": (4, {name: run for name, run in CHECKS.items() if run in FOUR | {MOVES}}),
    "2 from 4": (2, {name: run for name, run in CHECKS.items() if run is MOVES}),
}


def work(index, ranks, launch, folder):
    """One process of a launch: writes down what went wrong, check by check."""
    torch.set_num_threads(1)
    warnings.filterwarnings("error", module="quadstep")
    outcomes = {}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{launch}",
        rank=index,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    # The other numbers of ranks go on from these.
    saving = {"saves": check_checkpoints.save_for_others} if launch in ("2", "4") else {}
    for name, check in (saving | LAUNCHES[launch][1]).items():
        try:
            check(folder)
            outcomes[name] = ""
        except BaseException:
            outcomes[name] = traceback.format_exc()
        torch.save(outcomes, folder / f"outcomes-{launch}-{index}")
        if outcomes[name]:
            # The ranks are out of step now, nothing that follows would mean anything.
            os._exit(1)
    dist.destroy_process_group()


def launch_all(folder):
    """The outcomes of all launches: rank by rank, what each check raised."""
    context = multiprocessing.get_context("forkserver")
    # What takes seconds to import is imported once for all processes.
    context.set_forkserver_preload(["launches", "torch._dynamo"])
    found = {}
    for launch, (ranks, _) in LAUNCHES.items():
        processes = [
            context.Process(target=work, args=(index, ranks, launch, folder), daemon=True)
            for index in range(ranks)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + SECONDS
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in processes:
            process.kill()
        files = [folder / f"outcomes-{launch}-{index}" for index in range(ranks)]
        found[launch] = [torch.load(file) if file.exists() else {} for file in files]
    return found
