"""Placeholder of the CPU kernel, being written."""


class CpuW4A16:
    name = "cpu_w4a16"

    def supports(self, p):
        return "not written yet"
