"""Time limits and polling intervals of all packages, in seconds, with their reasons.

Modules read them as `timeouts.NAME` when they need them, so that a test can change one for a whole process.
"""

from __future__ import annotations

# -- signals and exit

INTERRUPT_TIMEOUT_SECONDS = 20.0
"""Time from Ctrl-C until the system ends the process, twice `INTERRUPT_DEADLINE_SECONDS`."""
INTERRUPT_DEADLINE_SECONDS = 10.0
"""Time from Ctrl-C to the end of a study, as promised to users."""
SAVE_SECONDS = 60.0
"""Time for trainers to checkpoint their lanes when a budget ends the study."""
INTERRUPT_SAVE_SECONDS = 4.0
"""`SAVE_SECONDS` after Ctrl-C. A lane in a long evaluation keeps its last checkpoint."""
MONITOR_JOIN_SECONDS = 10.0
"""Time for the driver's thread that follows the broker to end."""
TRAINER_PLACE_SECONDS = 60.0
"""Time after the start of a trainer in which no nodes are requested, so that it finds its place."""
TRAINER_THREAD_JOIN_SECONDS = 4.0
"""Time for the driver's threads of all ended trainers together to end."""
MLFLOW_FLUSH_SECONDS = 60.0
"""Time for MLflow and the other trackers to log the rest at the end of a study."""
INTERRUPT_MLFLOW_FLUSH_SECONDS = 5.0
"""`MLFLOW_FLUSH_SECONDS` after an error, and its maximum after Ctrl-C."""
FAULTY_TRACKER_FLUSH_SECONDS = 5.0
"""`MLFLOW_FLUSH_SECONDS` for another tracker that has had an error."""

# -- trainers, lanes and the broker

TRAINER_TIMEOUT_SECONDS = 300.0
"""Default of --trainer-timeout: time that a study waits without any trainer."""
NODE_START_SECONDS = 1800.0
"""Default of --trainer-timeout where nodes must be started first: a GPU machine may take long to be granted,
to boot and to be set up."""
TRAINER_SILENT_SECONDS = 60.0
"""Silence after which a trainer loses its lanes."""
TAKEOVER_SECONDS = 2.0
"""Time without a lane after which a trainer takes over lanes of another one."""
HEARTBEAT_SECONDS = 10.0
"""Interval of a trainer's heartbeats."""
HUNG_SECONDS = 1800.0
"""Time without a call or progress of a trainer's training thread after which its heartbeats end."""
LANE_START_SECONDS = 7200.0
"""`HUNG_SECONDS` while lanes start. A node may first download a base model (16 GB at 5 MB/s take 55 minutes),
and some variants compute singular vectors of every layer: both show no progress. Also the time limit of
sending tensors between a trainer's workers."""
WORKER_WAIT_SECONDS = 86_400.0
"""Time for which a trainer's workers wait for a command of rank 0, whose lanes may all be parked. They notice
at once when its process ends."""
BASELINE_POLL_SECONDS = 1.0
"""Interval at which a trainer looks for the scores of the base model that another trainer computes."""
REPORT_WAIT_SECONDS = 20.0
"""Length of one call that waits for a report; the trial then calls again."""
IDLE_TRAINER_SECONDS = 60.0
"""Time without a lane after which a trainer ends."""
SPILL_SECONDS = 1.0
"""Time after which a parked lane makes room for a lane that waits."""
MIN_CHECKPOINT_SECONDS = 60.0
"""The shortest interval between two checkpoints of a lane. A lane that trains for less is not saved before
its end."""
MAX_CHECKPOINT_SECONDS = 900.0
"""The longest interval between two checkpoints of a lane."""
STORE_FULL_SECONDS = 60.0
"""Time for which a trainer waits for space on a full disk."""
DEVICE_TEST_SECONDS = 120.0
"""Time for the test of a worker's device, including the start of CUDA on a busy machine; a broken GPU may
never answer."""

# -- cloud machines

DRAIN_TIMEOUT_SECONDS = 40.0
"""Time limit of `ray drain-node`, of the two minutes that a spot notice leaves: Ray's command line starts
slowly on a busy machine."""
SPOT_NOTICE_SECONDS = 120
"""Time between AWS's spot notice and the end of the machine."""
IMDS_REQUEST_SECONDS = 2.0
"""Time limit of a request to AWS's metadata service, which runs on the machine's own host."""

# -- checks of a cluster

NODE_RESPONSE_SECONDS = 90.0
"""Time for a node's answer, including the start of a Ray process there."""
STORAGE_VISIBILITY_SECONDS = 5.0
"""Time for a file to become visible to another machine."""

# -- files, servers and programs

TRACKER_PROGRESS_DELAY_SECONDS = 5.0
"""Time until the start or an evaluation of a lane is logged to a tracker, MLflow included, if the lane has
not ended by then."""
TRACKER_ANSWER_SECONDS = 15.0
"""Time for a tracker's server to answer when a run begins or ends."""
TRACKER_RETRY_SECONDS = 10.0
"""Pause before each new attempt to write to a tracker, MLflow included."""
CLOSING_TRACKER_RETRY_SECONDS = 1.0
"""`TRACKER_RETRY_SECONDS` once the study has ended and waits for the writer."""
ABANDONED_FOLDER_SECONDS = 3600.0
"""Age after which a temporary folder counts as left behind by a killed process."""
SANDBOX_SETUP_SECONDS = 60.0
"""Time for the setup of the sandbox on a busy machine; a program whose sandbox takes longer has failed."""

# -- polling and printing

SOURCE_POLL_SECONDS = 0.1
"""The shortest interval between a trainer's requests of one kind to the broker. It is longer while the broker
answers slowly."""
SESSION_POLL_SECONDS = 0.5
"""Interval at which the driver asks the broker for changes."""
NODE_COUNT_INTERVAL_SECONDS = 2.0
"""Interval at which the driver counts the cluster's nodes."""
DRAIN_POLL_SECONDS = 3.0
"""Interval at which a worker checks whether its node is drained; a spot machine leaves 30 s or more."""
RAYLET_POLL_SECONDS = 1.0
"""Interval at which a worker checks whether its raylet is still there."""
SPOT_POLL_SECONDS = 5.0
"""Interval at which the spot watcher asks for a notice, as recommended by AWS."""
PROGRESS_INTERVAL_SECONDS = 4.0
"""Interval of the lines that report the preparation of examples."""
PLAIN_LINE_INTERVAL_SECONDS = 10.0
"""Interval of the lines that report a study's progress where there is no terminal."""
