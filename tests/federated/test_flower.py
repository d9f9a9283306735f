"""What we know of Flower and lean on; a newer one may change it."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr")

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.server.workflow import SecAggPlusWorkflow

from lightning_distopt.federated.compat import identify_process, label
from lightning_distopt.federated.records import to_record
from tests.federated.toy import start


def test_messages_need_a_process_that_knows_its_run() -> None:
    identify_process()
    message = Message(content=RecordDict(), message_type=MessageType.TRAIN, dst_node_id=5, group_id="3")
    label(message, "17")
    reply = Message(RecordDict(), reply_to=message)
    assert (reply.metadata.src_node_id, reply.metadata.group_id, reply.metadata.reply_to_message_id) == (5, "3", "17")


def test_secure_aggregation_asks_for_the_legacy_api() -> None:
    workflow = SecAggPlusWorkflow(num_shares=3, reconstruction_threshold=2)
    with pytest.raises(TypeError, match="LegacyContext"):
        workflow(None, Context(1, 0, {}, RecordDict(), {}))


def test_records_hold_cycles_until_they_are_cleared() -> None:
    record = to_record(start())
    record.clear()
    assert len(record) == 0
