"""The backend is set up before any test module imports Megatron."""

import nemo_minitron.backend as backend

backend.setup()
