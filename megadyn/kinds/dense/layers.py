"""The dense layer: one of Qwen2 or Llama."""

from megadyn.model.block import Layer, Stream


class DenseLayer(Layer):
    """h + Block(h) for every token."""

    def forward(self, stream: Stream) -> Stream:
        return stream._replace(hidden=self.run(self.dense, stream.hidden, stream.documents))
