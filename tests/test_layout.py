import pytest

from mldcn.layout import Field, FieldLayout, as_layout


def test_offsets_follow_from_widths():
    layout = FieldLayout.build([("age", "numeric", "user", 1), ("pin", "categorical", "item", 4)])
    assert [field.columns for field in layout] == [slice(0, 1), slice(1, 5)]
    assert (layout.width, layout.widths, len(layout)) == (5, (1, 4), 2)


def test_a_bare_width_is_one_field():
    assert as_layout(7).widths == (7,)
    assert FieldLayout.uniform(3, 4).widths == (4, 4, 4)


def test_gaps_empty_and_doubled_fields_are_refused():
    with pytest.raises(ValueError, match="expected offset 0"):
        FieldLayout((Field("a", "numeric", "user", 1, 2),))
    with pytest.raises(ValueError, match="at least one field"):
        FieldLayout(())
    with pytest.raises(ValueError, match="distinct"):
        FieldLayout.build([("a", "numeric", "user", 1), ("a", "numeric", "user", 1)])
