"""The reproduction of the paper: metrics, comparison and figures. Nothing outside imports it."""
