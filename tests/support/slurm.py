"""Stand-ins for the commands of Slurm that the recipes call, on two nodes of one machine: 127.0.0.1 and 127.0.0.2."""

SCONTROL = "#!/bin/sh\necho 127.0.0.1; echo 127.0.0.2\n"
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
trap 'for pid in $pids; do kill -- -$pid; done' TERM
for node in 0 1; do SLURM_NODEID=$node setsid "$@" & pids="$pids $!"; done
for pid in $pids; do wait $pid || exit 1; done
"""


def stand_ins(folder):
    """Write `scontrol` and `srun` into a new folder, for PATH. Return the folder."""
    folder.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder
