"""What fits beside each other."""

from dbdist.monitor.tables import Column, fitting


def headers(width, gap=2, edge=0):
    columns = [Column("aaaa", ["x"], 1), Column("b", ["bbbb"], 3), Column("c", ["c"], 2, 4)]
    return "".join(column.header[0] for column in fitting(columns, width, gap, edge))


def test_the_least_important_columns_give_way_and_one_always_stays():
    assert [headers(width) for width in (16, 15, 10, 9, 0)] == ["abc", "bc", "bc", "b", "b"]


def test_edges_and_gaps_count():
    assert headers(19, gap=3, edge=1) == "abc"
    assert headers(18, gap=3, edge=1) == "bc"
