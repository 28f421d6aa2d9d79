#!/usr/bin/env python3
"""Pre-train a PMLM on a data set made by `python -m data_prep`.

Started once a rank, by DeepSpeed's launcher, torchrun, mpirun or srun (sbatch run_pretrain.sh):
  deepspeed --hostfile hosts run_pretrain.py --deepspeed_config ds_configs/zero2.json
  deepspeed --num_accelerators 2 run_pretrain.py --deepspeed_config ds_configs/zero2_local.json --model tiny
Started again with the same flags, it goes on where the newest whole checkpoint in --run ends.
"""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import nullcontext

from data_prep.console import USER_ERROR_STATUS, describe_error
from data_prep.errors import UserError
from pretrain.checkpoint import SaveFailed
from pretrain.config import check_flags, check_inputs, make_parser
from pretrain.device import speeds
from pretrain.launchers import take_place
from pretrain.lock import hold_run
from pretrain.logs import redirect_output, report_crash, wait_for_the_first_rank_to_report
from pretrain.watchdog import RETRY_STATUS, RankLost


def main() -> int:
    """Entry point of one rank; returns its exit status."""
    args = make_parser("run_pretrain.py", __doc__ or "").parse_args()
    rank, console, log, is_training = 0, sys.stderr, None, False
    try:
        if args.check_for_ranks is not None:
            check_flags(args, args.check_for_ranks, speeds())
            return 0
        place = take_place()
        rank = place.rank
        inputs = check_inputs(args, place.world_size, speeds())
        console, log = redirect_output(inputs.config.run, rank)
        with hold_run(inputs.config.run, console) if rank == 0 else nullcontext():
            from pretrain.train import train  # here, so that what is wrong is said before the seconds this import takes

            is_training = True
            train(inputs, console)
    except (ValueError, OSError) as error:
        if is_training and not isinstance(error, (UserError, OSError)):  # a defect of this program
            report_crash(error, console, log, rank)
            return 1
        if log:
            traceback.print_exc()  # to the log
        wait_for_the_first_rank_to_report(rank)
        print(f"run_pretrain.py: error: {describe_error(error)}", file=console, flush=True)
        return USER_ERROR_STATUS
    except KeyboardInterrupt:
        return 130
    except RankLost as error:
        traceback.print_exc()
        print(f"rank {rank}: {error}", file=console, flush=True)
        return RETRY_STATUS
    except SaveFailed as error:
        wait_for_the_first_rank_to_report(rank)
        print(f"run_pretrain.py: error: {error}", file=console, flush=True)
        return 1
    except Exception as error:
        report_crash(error, console, log, rank)
        return 1
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a rank whose peers are gone could wait for them in its destructors
