import numpy as np

from stsr.verbs.superres.scratch import Scratch


def test_rows_written_in_any_order_are_read_as_maps(tmp_path):
    values = np.random.default_rng(0).random((5, 7, 4)).astype(np.float32)
    scratch = Scratch(tmp_path / "raw", values.shape)
    scratch.write(3, values[:, 3:])
    scratch.write(0, values[:, :3])
    np.testing.assert_array_equal(scratch.read(slice(0, 5)), values)
    np.testing.assert_array_equal(scratch.read(slice(2, 4)), values[2:4])


def test_a_file_of_the_right_size_is_taken_over(tmp_path):
    first = Scratch(tmp_path / "raw", (2, 3, 4))
    first.write(1, np.ones((2, 1, 4)))
    again = Scratch(tmp_path / "raw", (2, 3, 4))
    assert first.fresh and not again.fresh and again.read(slice(0, 2)).sum() == 8
    other = Scratch(tmp_path / "raw", (2, 3, 5))
    assert other.fresh and not other.read(slice(0, 2)).any()
    other.remove()
    assert not (tmp_path / "raw").exists()
