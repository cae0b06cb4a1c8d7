"""SyncBatchNormalization beside Keras's own layer on the whole batch."""


def test_as_on_the_whole_batch(tensorflow_ranks):
    for message in tensorflow_ranks(3).call("sync_batch_norm_cases:all_cases"):
        assert "does not know synchronized=True" in message
