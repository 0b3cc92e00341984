"""Weights beside the graphs that use them, each tensor once, in 16 bits if wanted."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

SMALLEST = 1024  # bytes; what is smaller stays in the graph
_ALIGNMENT = 64


class WeightFiles:
    """
    Writes the weights of several graphs into one file each. A tensor that an earlier graph has, too, stays in the file
    of that one: a backbone that is lent is stored once.

    Args:
        folder (`Path`): Where the files go.
        dtype (`str`): `"float16"` or `"float32"`. Graphs compute in float32 whatever it is: 16 bits are cast first,
            which programs do once, when they load a graph.
    """

    def __init__(self, folder: Path, dtype: str):
        self.folder, self.dtype = folder, np.dtype(dtype)
        self._places: dict[str, tuple[str, int, int]] = {}

    def move_out(self, model: "onnx.ModelProto", file_name: str) -> list[str]:
        """
        Take the weights out of a graph.

        Args:
            model (`onnx.ModelProto`): The graph, which is changed.
            file_name (`str`): Of the file for those that no earlier graph has.

        Returns:
            `list[str]`: The files that the graph needs.

        Raises:
            ValueError: If a weight is not finite in this format.
        """
        from onnx import numpy_helper

        needed, casts = [], []
        with open(self.folder / file_name, "wb") as file:
            for tensor in model.graph.initializer:
                values = numpy_helper.to_array(tensor)
                if values.dtype != np.float32 or values.nbytes < SMALLEST:
                    continue
                with np.errstate(over="ignore"):
                    values = np.ascontiguousarray(values, self.dtype)
                if not np.isfinite(values).all():
                    raise ValueError(
                        f"`dtype` {self.dtype} cannot hold the weights of this model: {tensor.name} is not finite. "
                        "Export it in float32; if it fails there, too, the model is broken."
                    )
                place = self._place(values, file, file_name)
                needed.append(place[0])
                casts += _refer(tensor, values, place)
            is_used = file.tell() > 0
        if not is_used:
            (self.folder / file_name).unlink()
        nodes = [*casts, *model.graph.node]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        return list(dict.fromkeys(needed))

    def _place(self, values: np.ndarray, file, file_name: str) -> tuple[str, int, int]:
        """File, offset and length of a tensor, which is written if it is new."""
        data = values.tobytes()
        key = f"{hashlib.sha256(data).hexdigest()} {values.shape}"
        if key not in self._places:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            self._places[key] = (file_name, file.tell(), len(data))
            file.write(data)
        return self._places[key]


def _refer(tensor: "onnx.TensorProto", values: np.ndarray, place: tuple[str, int, int]) -> list["onnx.NodeProto"]:
    """Point a tensor at its place in a file; the nodes that make float32 of it under its old name."""
    from onnx import TensorProto, helper

    name = tensor.name
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in zip(("location", "offset", "length"), place):
        tensor.external_data.add(key=key, value=str(value))
    if values.dtype == np.float32:
        return []
    tensor.name, tensor.data_type = f"{name}.float16", TensorProto.FLOAT16
    return [helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT)]
