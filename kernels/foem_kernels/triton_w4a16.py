"""Placeholder of the Triton kernel, being written."""


class TritonW4A16:
    name = "triton_w4a16"

    def supports(self, p):
        return "not written yet"
