//! A data plane that fails: a destination that cannot put a block in place, a source that cannot read
//! one. What is not accepted stays at the source, in order, and such a failure is never taken for the
//! answer of a command.

use std::time::Duration;

use hybridmig_engine::blocks::Blocks;
use hybridmig_engine::session::destination::{DestinationConfig, DestinationMachine};
use hybridmig_engine::session::io::{
    DestinationCommand, DestinationInput, DestinationOutcome, DestinationRecord, Lane,
    SourceCommand, SourceInput, SourceOutcome,
};
use hybridmig_engine::session::source::{SourceConfig, SourceMachine};
use hybridmig_transport::message::{
    Features, GuestDescription, Message, Mode, Offer, RefusalCode, RegionId, RegionInfo,
    RegionKind, SUPPORTED_VERSIONS, SessionId,
};

const NOW: Duration = Duration::from_secs(1);

fn guest() -> GuestDescription {
    GuestDescription {
        kind: "workload".to_owned(),
        name: "test".to_owned(),
        facts: std::collections::BTreeMap::new(),
    }
}

fn regions() -> Vec<RegionInfo> {
    vec![RegionInfo {
        id: RegionId(0),
        kind: RegionKind::Memory,
        name: "ram".to_owned(),
        blocks: 64,
        block_size: 4096,
    }]
}

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
        guest: guest(),
        regions: regions(),
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

#[test]
fn a_load_that_ends_the_guests_process_says_why_though_the_pager_fails_first() {
    let mut machine = receiving();
    let handover = Message::Handover {
        batches: 0,
        postcopy_pass: 1,
        state_len: 3,
        state_hash: [0; 32],
        behind_pieces: 0,
    };
    machine.handle(NOW, DestinationInput::Message(handover));
    let armed = DestinationInput::Armed {
        missing: Blocks::new(),
    };
    machine.handle(NOW, armed);
    let last = std::iter::from_fn(|| machine.poll_command()).last();
    assert!(matches!(last, Some(DestinationCommand::LoadState { .. })));
    let pager = DestinationInput::PlacementFailed {
        error: "process 7 has ended".to_owned(),
    };
    machine.handle(NOW, pager);
    let load = DestinationInput::Failed {
        error: "QEMU said: unknown device".to_owned(),
    };
    machine.handle(NOW, load);
    machine.handle(NOW, DestinationInput::Abandoned);
    let commands: Vec<_> = std::iter::from_fn(|| machine.poll_command()).collect();
    let [
        DestinationCommand::Abandon,
        DestinationCommand::Journal(DestinationRecord::Declined { reason, .. }),
    ] = &commands[..]
    else {
        panic!("abandoned and recorded: {commands:?}");
    };
    assert_eq!(reason, "process 7 has ended; QEMU said: unknown device");
}

#[test]
fn a_block_that_cannot_be_read_ends_precopy_with_the_guest_at_the_source() {
    let config = SourceConfig::new(SessionId([7; 8]), Mode::Hybrid);
    let mut machine = SourceMachine::new(config, guest(), regions());
    machine.handle(NOW, SourceInput::Connected);
    let welcome = Message::Welcome {
        version: SUPPORTED_VERSIONS[0],
        features: Features::ALL,
        software: "test".to_owned(),
    };
    machine.handle(NOW, SourceInput::Message(welcome));
    let ready = Message::Ready { notes: Vec::new() };
    machine.handle(NOW, SourceInput::Message(ready));
    let mut populated = Blocks::new();
    populated.insert(RegionId(0), 3);
    machine.handle(NOW, SourceInput::Tracking(populated));
    while machine.poll_command().is_some() {}
    assert!(machine.poll_chunk(NOW, Lane::Bulk).is_some());
    let later = NOW * 2;
    machine.handle(later, SourceInput::Timeout);
    assert!(machine.poll_chunk(later, Lane::Bulk).is_none());
    let scanning = std::iter::from_fn(|| machine.poll_command())
        .any(|command| matches!(command, SourceCommand::Scan));
    assert!(scanning, "a scan is under way when the block fails");

    let error = "reading block 3: no such process".to_owned();
    machine.handle(later, SourceInput::Unreadable { error });
    let thaws = std::iter::from_fn(|| machine.poll_command())
        .filter(|command| matches!(command, SourceCommand::Thaw))
        .count();
    assert_eq!(thaws, 1);
    // The answers come in the order of the commands.
    machine.handle(later, SourceInput::Dirty(Blocks::new()));
    machine.handle(later, SourceInput::Thawed);
    let end = std::iter::from_fn(|| machine.poll_command()).last();
    let Some(SourceCommand::Finish(SourceOutcome::Cancelled { reason })) = end else {
        panic!("the session has ended here: {end:?}");
    };
    assert!(reason.contains("no such process"), "{reason}");
}
