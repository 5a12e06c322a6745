"""What the painter of app.py requires: pytest docs/example --gpu"""

import pytest
from app import build_painter, paint_two


@pytest.mark.vram(max_required="4GiB")
def test_painter(vram):
    record = vram.measure(build_painter, paint_two)
    assert record.status == "ok"
