"""Studies combine the engines: sweeps over many simulated runs, and comparisons."""
