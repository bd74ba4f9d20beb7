//! A destination that cannot put a block in place: what is not accepted is declined, in order, and a
//! late failure is never taken for the answer of a command.

use std::time::Duration;

use hybridmig_engine::session::destination::{DestinationConfig, DestinationMachine};
use hybridmig_engine::session::io::{
    DestinationCommand, DestinationInput, DestinationOutcome, DestinationRecord,
};
use hybridmig_transport::message::{
    Features, GuestDescription, Message, Mode, Offer, RefusalCode, RegionId, RegionInfo,
    RegionKind, SUPPORTED_VERSIONS, SessionId,
};

const NOW: Duration = Duration::from_secs(1);

fn receiving() -> DestinationMachine {
    let mut machine = DestinationMachine::new(DestinationConfig::default());
    machine.handle(NOW, DestinationInput::Connected);
    let hello = Message::Hello {
        versions: SUPPORTED_VERSIONS.to_vec(),
        features: Features::ALL,
        software: "test".to_owned(),
        session: SessionId([7; 8]),
        resume: false,
    };
    machine.handle(NOW, DestinationInput::Message(hello));
    let offer = Offer {
        guest: GuestDescription {
            kind: "workload".to_owned(),
            name: "test".to_owned(),
            facts: std::collections::BTreeMap::new(),
        },
        regions: vec![RegionInfo {
            id: RegionId(0),
            kind: RegionKind::Memory,
            name: "ram".to_owned(),
            blocks: 64,
            block_size: 4096,
        }],
        mode: Mode::Hybrid,
        check_only: false,
    };
    machine.handle(NOW, DestinationInput::Message(Message::Offer(offer)));
    machine.handle(NOW, DestinationInput::Checked(Ok(Vec::new())));
    machine.handle(NOW, DestinationInput::Prepared);
    while machine.poll_command().is_some() {}
    machine
}

fn full() -> DestinationInput {
    DestinationInput::PlacementFailed {
        error: "memory is full".to_owned(),
    }
}

#[test]
fn full_memory_before_the_handover_is_a_refusal_in_order() {
    let mut machine = receiving();
    machine.handle(NOW, full());
    assert!(matches!(
        machine.poll_command(),
        Some(DestinationCommand::Abandon)
    ));
    // The other applying thread fails too, and then once more while the refusal is recorded.
    machine.handle(NOW, full());
    machine.handle(NOW, DestinationInput::Abandoned);
    let Some(DestinationCommand::Journal(DestinationRecord::Declined { reason, .. })) =
        machine.poll_command()
    else {
        panic!("the refusal is recorded before anything else");
    };
    assert!(reason.contains("memory is full"));
    machine.handle(NOW, full());
    assert!(machine.poll_command().is_none());
    machine.handle(NOW, DestinationInput::Journaled);
    let Some(DestinationCommand::Send(Message::Refuse(refusal))) = machine.poll_command() else {
        panic!("the source is told");
    };
    assert_eq!(refusal.code, RefusalCode::Load);
    let acknowledged = Message::Cancel {
        reason: "refused".to_owned(),
    };
    machine.handle(NOW, DestinationInput::Message(acknowledged));
    let end = std::iter::from_fn(|| machine.poll_command()).last();
    assert!(matches!(
        end,
        Some(DestinationCommand::Finish(DestinationOutcome::Refused(_)))
    ));
}
