"""Fine-tuning in one process: lanes in, reports and records out. Imports no Ray."""

import os

# The AMX kernels of oneDNN round by the number of matrices: a bfloat16 lane on a CPU would depend on other
# lanes. oneDNN reads the variable at its first product. A value that the user has set stays.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
