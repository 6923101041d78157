"""The specification of every op in plain torch; also what runs on a CPU. Never imports Triton."""
