"""Time limits and polling intervals of all packages, in seconds, with their reasons.

Modules read them as `timeouts.NAME` when they need them, so that a test can change one for a whole process.
"""

from __future__ import annotations

# -- signals and exit

INTERRUPT_TIMEOUT_SECONDS = 20.0
"""From Ctrl-C until another thread ends the process. Half of it is what users are promised."""
INTERRUPT_DEADLINE_SECONDS = 10.0
"""From Ctrl-C to the end of a study."""
SAVE_SECONDS = 60.0
"""For trainers to checkpoint their lanes when a budget ends the study."""
INTERRUPT_SAVE_SECONDS = 4.0
"""The same after Ctrl-C. A lane in a long evaluation keeps its last checkpoint."""
TRAINER_SHUTDOWN_SECONDS = 5.0
"""For trainers to end by themselves."""
INTERRUPT_TRAINER_SHUTDOWN_SECONDS = 0.5
"""The same after Ctrl-C, when everything has been reported already."""
TRAINER_THREAD_JOIN_SECONDS = 2.0
"""For all threads of killed trainers together to end."""
MLFLOW_FLUSH_SECONDS = 60.0
"""For MLflow to catch up at the end of a study."""
INTERRUPT_MLFLOW_FLUSH_SECONDS = 5.0
"""The same after an error, and at most after Ctrl-C."""
MIN_REPORT_SECONDS = 4.0
"""The report is skipped when Ctrl-C leaves less time than this."""
# -- trainers, lanes and the broker

MAX_CLOCK_GAP_SECONDS = 15.0
"""Longer than any gap between two readings of a clock on a machine that is not suspended."""
TRAINER_TIMEOUT_SECONDS = 300.0
"""The default of --trainer-timeout: how long a study goes on without any trainer."""
NODE_START_SECONDS = 1800.0
"""The same where nodes must be started first: a GPU machine may take long to be granted, boot and be set
up."""
TRAINER_SILENT_SECONDS = 60.0
"""A trainer that has been silent for so long loses its lanes."""
STARVATION_SECONDS = 60.0
"""A group key, or a suspect, that has waited for so long gets a trainer of its own."""
ORPHAN_LANE_SECONDS = 60.0
"""After a restart of the broker: how long a lane that a trainer announced waits for its trial."""
HEARTBEAT_SECONDS = 10.0
"""Between two signs of life of a trainer."""
HUNG_SECONDS = 1800.0
"""A trainer whose training thread has made no call for so long sends no more signs of life."""
BROKER_LOST_SECONDS = 30.0
"""Callers that get no answer from the broker for so long give it up."""
REPORT_WAIT_SECONDS = 20.0
"""Of one call that waits for a report; the trial then calls again."""
IDLE_TRAINER_SECONDS = 60.0
"""A trainer that has had no lane for so long ends."""
UNREACHABLE_TIMEOUT_SECONDS = 30.0
"""For Ray to find out why a worker cannot be reached."""
PLACEMENT_GROUP_CLEANUP_SECONDS = 20.0
"""After a trainer's death: how long its placement group is looked for."""
# -- Ray's processes

RAY_EXIT_SECONDS = 2.0
"""A Ray that has lost its driver ends most of its processes in this time."""
LOCAL_CONTROL_STORE_SECONDS = 30.0
"""For the control store of a Ray that was started here, which nobody starts again."""
CONTROL_STORE_RECONNECT_SECONDS = 60.0
"""Ray's own default of RAY_gcs_rpc_server_reconnect_timeout_s."""
CONTROL_STORE_JOIN_SECONDS = 5.0
"""For the thread that watches the control store to end; one of its checks takes a second at most."""
RAYLET_TERMINATE_SECONDS = 10.0
"""Between SIGTERM and SIGKILL for the processes of a node whose head has ended."""
DRAIN_TIMEOUT_SECONDS = 40.0
"""For `ray drain-node`, of the two minutes that a spot notice leaves: Ray's command line starts slowly on
a busy machine."""
# -- cloud machines

SPOT_NOTICE_SECONDS = 120.0
"""Between AWS's spot notice and the end of the machine."""
IMDS_REQUEST_SECONDS = 2.0
"""For AWS's metadata service, which runs on the machine's own host."""
IMDS_TOKEN_TTL_SECONDS = 21600
"""The longest life of a token that AWS's metadata service grants."""
DRAIN_RETRY_SECONDS = 1.0
"""Between two attempts to drain a node after a notice: Ray may still be starting."""
INITIAL_BACKOFF_SECONDS = 1.0
"""Before a command that ended at once is started again."""
MAX_BACKOFF_SECONDS = 30.0
"""The most of that, after it has been doubled several times."""
STABLE_SECONDS = 60.0
"""A command that ran for so long did not fail to start."""
SERVER_STARTUP_SECONDS = 180.0
"""For a server's first answer: MLflow migrates its database first."""
SERVER_TERMINATE_SECONDS = 15.0
"""Between SIGTERM and SIGKILL for a supervised command."""
CLUSTER_LOOKUP_SECONDS = 10.0
"""For the look-up of a cluster that the user has not named, including the start of Ray's command."""
SSH_CONNECT_SECONDS = 60.0
"""For SSH to connect."""
JOB_QUERY_SECONDS = 120.0
"""For a job that only answers a question."""
# -- preflight checks

MAX_CLOCK_OFFSET_SECONDS = 2.0
"""Largest allowed difference between the clocks of two nodes."""
NODE_RESPONSE_SECONDS = 90.0
"""For a node's answer; a new process of Ray's must start there first."""
STORAGE_VISIBILITY_SECONDS = 5.0
"""For a file to be seen by another machine."""
# -- files, servers and programs

TRACKING_SERVER_SECONDS = 4.0
"""For an MLflow server or its database to answer before a study starts."""
MIN_MLFLOW_RETRY_SECONDS = 0.5
"""Before the first new attempt to write to MLflow; each later pause is twice as long."""
MAX_MLFLOW_RETRY_SECONDS = 30.0
"""The longest of those pauses."""
CLOSING_MLFLOW_RETRY_SECONDS = 1.0
"""The longest of those pauses once the study has ended and waits for the writer."""
ABANDONED_FOLDER_SECONDS = 3600.0
"""A temporary folder that was not written to for so long was left behind by a process that was killed."""
SANDBOX_SETUP_SECONDS = 60.0
"""For the sandbox to be set up on a busy machine before the machine is blamed."""
# -- how often something is looked at

SESSION_POLL_SECONDS = 0.5
"""The driver asks the broker for what has changed."""
NODE_COUNT_INTERVAL_SECONDS = 2.0
"""The driver counts the cluster's nodes."""
DRAIN_POLL_SECONDS = 3.0
"""A worker asks whether its node is drained; a spot machine leaves 30 s or more."""
RAYLET_POLL_SECONDS = 1.0
"""A worker looks whether its Ray is still there."""
CONTROL_STORE_POLL_SECONDS = 2.0
"""The driver connects to Ray's control store."""
HEAD_POLL_SECONDS = 2.0
"""A node's watchdog connects to the head."""
SPOT_POLL_SECONDS = 5.0
"""The spot watcher asks for a notice, as often as AWS recommends."""
HEALTH_POLL_SECONDS = 5.0
"""The supervisor checks a command's health; also the time limit of that check."""
PROGRESS_INTERVAL_SECONDS = 4.0
"""The preparation of examples prints how many are done."""
PLAIN_LINE_INTERVAL_SECONDS = 10.0
"""A study prints its state where there is no terminal."""
JOB_POLL_SECONDS = 0.3
"""The state of a job on a cluster's head is asked for."""
