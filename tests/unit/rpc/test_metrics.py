"""One page of metrics for all processes."""

from dflash_ray.rpc.metrics import merge_expositions


def test_merged_metrics_say_whose_they_are():
    text = '# HELP x_total Things\n# TYPE x_total counter\nx_total{model="m"} 1.0\n'
    merged = merge_expositions({"a": text, "b": text})
    assert merged.count("# TYPE x_total") == 1
    assert 'x_total{process="a",model="m"} 1.0' in merged and 'process="b"' in merged
