//! Peers that send anything at any time: neither machine panics, and neither ever breaks its word.
//! What each refusal says to a peer that merely does not fit stands here too.

use std::collections::BTreeMap;
use std::time::Duration;

use hybridmig_engine::blocks::{BlockSet, Blocks, RegionId};
use hybridmig_engine::session::destination::{DestinationConfig, DestinationMachine};
use hybridmig_engine::session::io::{
    AppliedBatch, DestinationCommand, DestinationInput, DestinationOutcome, DestinationRecord,
    Lane, SourceCommand, SourceInput, SourceOutcome, SourceRecord,
};
use hybridmig_engine::session::source::{SourceConfig, SourceMachine};
use hybridmig_transport::message::{
    DestinationSummary, Features, GuestDescription, Message, Mode, Offer, Refusal, RefusalCode,
    RegionInfo, RegionKind, ResumeTimings, SessionId, Standing,
};
use proptest::prelude::*;

const SESSION: SessionId = SessionId([9; 8]);
const RAM: RegionId = RegionId(0);

fn regions() -> Vec<RegionInfo> {
    vec![RegionInfo {
        id: RAM,
        kind: RegionKind::Memory,
        name: "ram".into(),
        blocks: 32,
        block_size: 4096,
    }]
}

fn guest() -> GuestDescription {
    GuestDescription {
        kind: "model".into(),
        name: "guest".into(),
        facts: BTreeMap::new(),
    }
}

fn offer() -> Offer {
    Offer {
        guest: guest(),
        regions: regions(),
        mode: Mode::Hybrid,
        check_only: false,
    }
}

fn hello(session: SessionId, resume: bool) -> Message {
    Message::Hello {
        versions: vec![1],
        features: Features::ALL,
        software: "peer".into(),
        session,
        resume,
    }
}

fn welcome() -> Message {
    Message::Welcome {
        version: 1,
        features: Features::ALL,
        software: "peer".into(),
    }
}

fn refusal(code: RefusalCode) -> Refusal {
    Refusal {
        code,
        reasons: vec!["because".into()],
    }
}

/// Some valid, some beyond the guest, some nonsense.
fn any_message() -> impl Strategy<Value = Message> {
    let region = prop_oneof![4 => Just(RAM), 1 => Just(RegionId(7))];
    let set = prop::collection::vec(0u32..40, 0..6).prop_map(|b| b.into_iter().collect());
    let numbers = prop::collection::vec(0u32..40, 0..6);
    let piece = (region.clone(), set).boxed();
    let code = prop_oneof![
        Just(RefusalCode::Other),
        Just(RefusalCode::UnknownSession),
        Just(RefusalCode::Load)
    ];
    let standing = prop_oneof![
        Just(Standing::Preparing),
        Just(Standing::Loading),
        Just(Standing::Accepted),
        Just(Standing::Complete),
        Just(Standing::Refused(refusal(RefusalCode::Load))),
    ];
    let batches = prop::collection::vec((0u64..12, 0u64..12), 0..3);
    prop_oneof![
        1 => any::<bool>().prop_map(|resume| hello(SESSION, resume)),
        1 => Just(hello(SessionId([1; 8]), false)),
        3 => Just(welcome()),
        1 => code.prop_map(|code| Message::Refuse(refusal(code))),
        2 => Just(Message::Offer(offer())),
        3 => Just(Message::Ready { notes: vec![] }),
        1 => (batches, region.clone(), numbers.clone()).prop_map(|(batches, region, blocks)| {
            let rejected = blocks.into_iter().map(|block| (region, block)).collect();
            Message::Applied { batches, rejected }
        }),
        1 => piece.clone().prop_map(|(region, blocks): (RegionId, BlockSet)| Message::Behind {
            region,
            blocks
        }),
        3 => (0u64..4, 0u32..4, 0u64..3, 0u32..3).prop_map(|(batches, pass, len, pieces)| {
            Message::Handover {
                batches,
                postcopy_pass: pass,
                state_len: len,
                state_hash: [0; 32],
                behind_pieces: pieces,
            }
        }),
        3 => Just(Message::Accepted(ResumeTimings::default())),
        1 => Just(Message::Declined(refusal(RefusalCode::Load))),
        1 => (region, numbers).prop_map(|(region, blocks)| Message::Fetch { region, blocks }),
        2 => Just(Message::AllPlaced(DestinationSummary::default())),
        1 => Just(Message::Released),
        1 => Just(Message::Cancel { reason: "because".into() }),
        3 => (standing, 0u32..3).prop_map(|(standing, missing_pieces)| Message::Status {
            standing,
            missing_pieces
        }),
        1 => piece.prop_map(|(region, blocks)| Message::Missing { region, blocks }),
        1 => Just(Message::Seeds { block_size: 4096, names: vec![1, 2] }),
    ]
}

/// What happens next: a message, or something else that the driver may say.
#[derive(Clone, Debug)]
enum Step {
    Message(Message),
    Connect,
    Disconnect,
    Fail,
    Cancel,
    Wait(u64),
    Batch(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        20 => any_message().prop_map(Step::Message),
        3 => Just(Step::Connect),
        1 => Just(Step::Disconnect),
        1 => Just(Step::Fail),
        1 => Just(Step::Cancel),
        2 => (0u64..400_000).prop_map(Step::Wait),
        3 => (0u64..6).prop_map(Step::Batch),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    /// Once the handover has been sent the source thaws only on the destination's word.
    #[test]
    fn the_source_keeps_its_word(steps in steps(), opening in 0usize..4) {
        let mut config = SourceConfig::new(SESSION, Mode::Hybrid);
        config.min_round = Duration::ZERO;
        let mut machine = SourceMachine::new(config, guest(), regions());
        let mut now = Duration::ZERO;
        let (mut handed_over, mut word, mut recorded) = (false, false, Vec::new());
        let mut fail = false;
        // Most runs get past the greeting, or they would say little.
        let greeting = [
            Step::Connect,
            Step::Message(welcome()),
            Step::Message(Message::Ready { notes: vec![] }),
        ];
        for step in greeting.into_iter().take(opening).chain(steps) {
            now += Duration::from_millis(1);
            let mut inputs = vec![match step {
                Step::Message(message) => {
                    word |= matches!(
                        message,
                        Message::Declined(_)
                            | Message::Refuse(_)
                            | Message::Cancel { .. }
                            | Message::Status { standing: Standing::Refused(_), .. }
                    );
                    SourceInput::Message(message)
                }
                Step::Connect => SourceInput::Connected,
                Step::Disconnect => SourceInput::Disconnected { reason: "cut".into() },
                Step::Fail => {
                    fail = true;
                    continue;
                }
                Step::Cancel => SourceInput::Cancel { reason: "operator".into() },
                Step::Wait(ms) => {
                    now += Duration::from_millis(ms);
                    SourceInput::Timeout
                }
                Step::Batch(_) => continue,
            }];
            while let Some(input) = inputs.pop() {
                machine.handle(now, input);
                for lane in Lane::ALL {
                    while let Some(chunk) = machine.poll_chunk(now, lane) {
                        inputs.push(SourceInput::Sent { batch: chunk.batch, bytes: 100 });
                    }
                }
                while let Some(command) = machine.poll_command() {
                    let answer = match command {
                        SourceCommand::Send(Message::Handover { .. }) => {
                            let last = recorded.last();
                            let offered =
                                matches!(last, Some(SourceRecord::HandoverOffered { .. }));
                            prop_assert!(offered, "sent before it was recorded");
                            handed_over = true;
                            word = false;
                            continue;
                        }
                        SourceCommand::Send(_) | SourceCommand::CloseLink { .. } => continue,
                        SourceCommand::Finish(outcome) => {
                            if handed_over && !word {
                                let kept = matches!(
                                    outcome,
                                    SourceOutcome::Moved
                                        | SourceOutcome::InDoubt { .. }
                                        | SourceOutcome::Incomplete { .. }
                                );
                                prop_assert!(kept, "{:?}", outcome);
                            }
                            continue;
                        }
                        _ if std::mem::take(&mut fail) => {
                            SourceInput::Failed { error: "told to".into() }
                        }
                        SourceCommand::StartTracking => {
                            let all = std::iter::once((RAM, (0..32).collect()));
                            SourceInput::Tracking(all.collect())
                        }
                        SourceCommand::Scan => SourceInput::Dirty(Blocks::new()),
                        SourceCommand::Freeze => SourceInput::Frozen {
                            needed: Blocks::default(),
                        },
                        SourceCommand::SaveState => SourceInput::StateSaved {
                            len: 10,
                            hash: [0; 32],
                        },
                        SourceCommand::Journal(record) => {
                            recorded.push(record);
                            SourceInput::Journaled
                        }
                        SourceCommand::Thaw => {
                            prop_assert!(!handed_over || word, "thawed on its own");
                            SourceInput::Thawed
                        }
                        SourceCommand::Release => {
                            prop_assert!(handed_over, "released a guest that never left");
                            SourceInput::Released
                        }
                    };
                    inputs.insert(0, answer);
                }
            }
        }
    }

    /// The guest runs at the destination only after a durable acceptance, and once that is there
    /// refusal is said only after the guest was ended and that is durable.
    #[test]
    fn the_destination_keeps_its_word(steps in steps(), opening in 0usize..3) {
        let mut machine = DestinationMachine::new(DestinationConfig::default());
        let mut now = Duration::ZERO;
        let mut recorded: Vec<DestinationRecord> = Vec::new();
        let (mut runs, mut fail, mut batches) = (false, false, 0);
        let greeting = [
            Step::Connect,
            Step::Message(hello(SESSION, false)),
            Step::Message(Message::Offer(offer())),
        ];
        for step in greeting.into_iter().take(opening + 1).chain(steps) {
            now += Duration::from_millis(1);
            let mut inputs = vec![match step {
                Step::Message(message) => DestinationInput::Message(message),
                Step::Connect => DestinationInput::Connected,
                Step::Disconnect => DestinationInput::Disconnected { reason: "cut".into() },
                Step::Fail => {
                    fail = true;
                    continue;
                }
                Step::Cancel => DestinationInput::Cancel { reason: "operator".into() },
                Step::Wait(ms) => {
                    now += Duration::from_millis(ms);
                    DestinationInput::Timeout
                }
                Step::Batch(skip) => {
                    batches += 1;
                    let placed = std::iter::once((RAM, (0..32).collect())).collect();
                    DestinationInput::Applied(AppliedBatch {
                        batch: (batches + skip) % 5,
                        placed,
                        ..AppliedBatch::default()
                    })
                }
            }];
            while let Some(input) = inputs.pop() {
                machine.handle(now, input);
                while let Some(command) = machine.poll_command() {
                    let accepted = recorded
                        .iter()
                        .any(|r| matches!(r, DestinationRecord::Accepted { .. }));
                    let declined =
                        matches!(recorded.last(), Some(DestinationRecord::Declined { .. }));
                    let answer = match command {
                        DestinationCommand::Send(
                            Message::Declined(_)
                            | Message::Status { standing: Standing::Refused(_), .. },
                        ) => {
                            prop_assert!(!runs && (!accepted || declined));
                            continue;
                        }
                        DestinationCommand::Send(Message::Accepted(_)) => {
                            prop_assert!(runs && accepted && !declined);
                            continue;
                        }
                        DestinationCommand::Send(Message::AllPlaced(_)) => {
                            prop_assert!(recorded.contains(&DestinationRecord::Complete), "not recorded");
                            continue;
                        }
                        DestinationCommand::Finish(outcome) => {
                            let moved = matches!(
                                outcome,
                                DestinationOutcome::Moved | DestinationOutcome::Incomplete { .. }
                            );
                            prop_assert_eq!(moved, runs);
                            continue;
                        }
                        DestinationCommand::Send(_)
                        | DestinationCommand::Fetch { .. }
                        | DestinationCommand::CloseLink { .. } => continue,
                        _ if std::mem::take(&mut fail) => {
                            // A completion that cannot be recorded is completed all the same.
                            if let DestinationCommand::Journal(DestinationRecord::Complete) = command
                            {
                                recorded.push(DestinationRecord::Complete);
                            }
                            DestinationInput::Failed { error: "told to".into() }
                        }
                        DestinationCommand::Check(_) => DestinationInput::Checked(Ok(vec![])),
                        DestinationCommand::Prepare(_) => DestinationInput::Prepared,
                        DestinationCommand::Arm { behind, .. } => {
                            DestinationInput::Armed { missing: behind }
                        }
                        DestinationCommand::LoadState { .. } => DestinationInput::Loaded,
                        DestinationCommand::Journal(record) => {
                            recorded.push(record);
                            DestinationInput::Journaled
                        }
                        DestinationCommand::Resume => {
                            prop_assert!(accepted && !declined);
                            runs = true;
                            DestinationInput::Resumed
                        }
                        DestinationCommand::Disarm => DestinationInput::Disarmed,
                        DestinationCommand::Abandon => {
                            prop_assert!(!runs);
                            DestinationInput::Abandoned
                        }
                    };
                    inputs.insert(0, answer);
                }
            }
        }
    }
}

/// Everything that the destination says to these messages on a fresh link.
fn replies(machine: &mut DestinationMachine, messages: Vec<Message>) -> Vec<DestinationCommand> {
    machine.handle(Duration::ZERO, DestinationInput::Connected);
    let mut replies = Vec::new();
    for message in messages {
        machine.handle(Duration::ZERO, DestinationInput::Message(message));
        replies.extend(std::iter::from_fn(|| machine.poll_command()));
    }
    replies
}

fn refused(replies: &[DestinationCommand]) -> Option<&Refusal> {
    replies.iter().find_map(|reply| match reply {
        DestinationCommand::Send(Message::Refuse(refusal)) => Some(refusal),
        _ => None,
    })
}

#[test]
fn a_peer_without_a_common_version_is_told_both_sides_versions() {
    let mut machine = DestinationMachine::new(DestinationConfig::default());
    let stranger = Message::Hello {
        versions: vec![70, 71],
        features: 0,
        software: "peer".into(),
        session: SESSION,
        resume: false,
    };
    let replies = replies(&mut machine, vec![stranger]);
    let refusal = refused(&replies).expect("a refusal");
    assert_eq!(refusal.code, RefusalCode::Version);
    let text = refusal.to_string();
    assert!(text.contains("70") && text.contains("[1]"), "{text}");
    // It goes on waiting.
    assert_eq!(machine.session(), None);
    let replies = self::replies(&mut machine, vec![hello(SESSION, false)]);
    assert!(refused(&replies).is_none());
}

#[test]
fn a_second_sender_is_told_that_the_destination_is_busy() {
    let mut machine = DestinationMachine::new(DestinationConfig::default());
    replies(&mut machine, vec![hello(SESSION, false)]);
    let other = hello(SessionId([1; 8]), false);
    let refusal = machine.refuse_other(&other).expect("refused");
    assert_eq!(refusal.code, RefusalCode::Busy);
    assert!(refusal.to_string().contains(&SESSION.to_string()));
    // The same session started anew is a second sender too; its own source comes back with
    // `resume`.
    assert!(machine.refuse_other(&hello(SESSION, false)).is_some());
    assert!(machine.refuse_other(&hello(SESSION, true)).is_none());
}

#[test]
fn a_session_that_nobody_knows_cannot_be_resumed() {
    let mut machine = DestinationMachine::new(DestinationConfig::default());
    let replies = replies(&mut machine, vec![hello(SESSION, true)]);
    let refusal = refused(&replies).expect("a refusal");
    assert_eq!(refusal.code, RefusalCode::UnknownSession);
}

#[test]
fn whoever_does_not_greet_is_shown_the_door() {
    let mut machine = DestinationMachine::new(DestinationConfig::default());
    let replies = replies(&mut machine, vec![Message::Offer(offer())]);
    assert!(matches!(
        replies[..],
        [DestinationCommand::CloseLink { .. }]
    ));
}

#[test]
fn an_offer_that_makes_no_sense_is_refused_by_name() {
    let mut machine = DestinationMachine::new(DestinationConfig::default());
    let mut bad = offer();
    bad.regions[0].block_size = 1000;
    let replies = replies(
        &mut machine,
        vec![hello(SESSION, false), Message::Offer(bad)],
    );
    let refusal = refused(&replies).expect("a refusal");
    assert_eq!(refusal.code, RefusalCode::Protocol);
    assert!(refusal.to_string().contains("1000"), "{refusal}");
}

#[test]
fn names_of_seeds_belong_on_the_bulk_lane_of_a_destination() {
    let names = || Message::Seeds {
        block_size: 4096,
        names: vec![1],
    };
    let mut source =
        SourceMachine::new(SourceConfig::new(SESSION, Mode::Hybrid), guest(), regions());
    source.handle(Duration::ZERO, SourceInput::Connected);
    for message in [welcome(), names()] {
        source.handle(Duration::ZERO, SourceInput::Message(message));
    }
    let refused = std::iter::from_fn(|| source.poll_command()).any(|command| {
        matches!(
            command,
            SourceCommand::Send(Message::Refuse(refusal)) if refusal.code == RefusalCode::Protocol
        )
    });
    assert!(refused);

    let mut destination = DestinationMachine::new(DestinationConfig::default());
    let replies = replies(&mut destination, vec![hello(SESSION, false), names()]);
    let refusal = self::refused(&replies).expect("a refusal");
    assert_eq!(refusal.code, RefusalCode::Protocol);
}

#[test]
fn checks_alone_end_with_the_notes_of_both_sides() {
    let mut config = SourceConfig::new(SESSION, Mode::Hybrid);
    config.check_only = true;
    let mut source = SourceMachine::new(config, guest(), regions());
    let notes = vec!["memory: 4 GiB free".to_owned()];
    source.handle(Duration::ZERO, SourceInput::Connected);
    for message in [
        welcome(),
        Message::Ready {
            notes: notes.clone(),
        },
    ] {
        source.handle(Duration::ZERO, SourceInput::Message(message));
    }
    let last = std::iter::from_fn(|| source.poll_command()).last();
    assert!(
        matches!(&last, Some(SourceCommand::Finish(SourceOutcome::Checked { notes: told })) if *told == notes),
        "{last:?}"
    );

    let mut destination = DestinationMachine::new(DestinationConfig::default());
    let checking = Message::Offer(Offer {
        check_only: true,
        ..offer()
    });
    let asked = replies(&mut destination, vec![hello(SESSION, false), checking]);
    assert!(matches!(asked.last(), Some(DestinationCommand::Check(_))));
    destination.handle(Duration::ZERO, DestinationInput::Checked(Ok(notes)));
    let last = std::iter::from_fn(|| destination.poll_command()).last();
    assert!(
        matches!(
            &last,
            Some(DestinationCommand::Finish(DestinationOutcome::Checked))
        ),
        "{last:?}"
    );
}
