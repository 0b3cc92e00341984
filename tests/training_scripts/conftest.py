import pytest
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """Accelerate keeps its settings for the life of the process; each test begins without any."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
