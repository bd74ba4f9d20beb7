//! The commands of both machines, carried out on the model guest: how long they take, when they take
//! effect, how they fail.

use hybridmig_engine::session::io::{
    DestinationCommand, DestinationInput, DestinationRecord, Lane, SourceCommand, SourceInput,
};
use hybridmig_engine::session::ledger::Ledger;
use hybridmig_transport::message::Message;
use rand::Rng;

use super::net::Item;
use super::scenario::{Around, End};
use super::world::{Event, Job, World};

impl World {
    pub fn source_command(&mut self, command: SourceCommand) {
        match command {
            SourceCommand::Send(message) => {
                self.send(End::Source, Lane::Control, Item::Message(message));
            }
            SourceCommand::CloseLink { .. } => self.close(End::Source),
            SourceCommand::Finish(outcome) => {
                assert!(self.source.jobs.is_empty(), "ends with work to do");
                self.source.outcome = Some(outcome);
                self.close(End::Source);
            }
            job => self.source.jobs.push_back(job),
        }
    }

    pub fn destination_command(&mut self, command: DestinationCommand) {
        match command {
            DestinationCommand::Send(message) => {
                self.send(End::Destination, Lane::Control, Item::Message(message));
            }
            DestinationCommand::Fetch { region, blocks } => {
                let fetch = Item::Message(Message::Fetch { region, blocks });
                self.send(End::Destination, Lane::Urgent, fetch);
            }
            DestinationCommand::CloseLink { .. } => self.close(End::Destination),
            DestinationCommand::Finish(outcome) => {
                self.destination.outcome = Some(outcome);
                self.destination.job = None;
                self.destination.jobs.clear();
                self.close(End::Destination);
            }
            DestinationCommand::Abandon => {
                self.interrupt();
                self.destination.jobs.push_back(DestinationCommand::Abandon);
            }
            job => self.destination.jobs.push_back(job),
        }
    }

    /// Ends the command at work, for an `Abandon`; its answer comes first.
    fn interrupt(&mut self) {
        let Some(job) = self.destination.job.take() else {
            return;
        };
        self.load_waits.clear();
        let waits = matches!(job.command, DestinationCommand::LoadState { .. });
        if job.done && !job.fails && !waits {
            // Already done: only the answer was missing.
            let answer = self.destination_effect_answer(&job.command);
            self.destination_input(answer);
        } else {
            let error = "interrupted".into();
            self.destination_input(DestinationInput::Failed { error });
        }
    }

    pub fn start_jobs(&mut self) {
        if self.source.alive()
            && self.source.job.is_none()
            && let Some(command) = self.source.jobs.pop_front()
        {
            let number = self.source.started;
            self.source.started += 1;
            let fails = self.fails(End::Source, number);
            if self.dies(End::Source, number, Around::Before) {
                return;
            }
            let token = self.schedule(End::Source);
            let early = self.rng.random_bool(0.5);
            self.source.job = Some(Job {
                token,
                command,
                done: false,
                fails,
            });
            if early {
                self.source_effect();
            }
        }
        if self.destination.alive()
            && self.destination.job.is_none()
            && let Some(command) = self.destination.jobs.pop_front()
        {
            let number = self.destination.started;
            self.destination.started += 1;
            let fails = self.fails(End::Destination, number);
            if self.dies(End::Destination, number, Around::Before) {
                return;
            }
            let token = self.schedule(End::Destination);
            let early = self.rng.random_bool(0.5);
            self.destination.job = Some(Job {
                token,
                command,
                done: false,
                fails,
            });
            if early {
                self.destination_effect();
            }
        }
    }

    fn schedule(&mut self, end: End) -> u64 {
        let token = self.rng.random();
        self.after_us(50, 20_000, Event::Job(end, token));
        token
    }

    fn fails(&mut self, end: End, number: u64) -> bool {
        let chosen = self.scenario.failures.contains(&(end, number));
        chosen || self.rng.random_bool(self.scenario.failure_rate)
    }

    /// Lets the process die if this is where it is meant to.
    fn dies(&mut self, end: End, number: u64, around: Around) -> bool {
        let here = self.scenario.crash == Some((end, number, around));
        if here {
            self.crash(end);
        }
        here
    }

    pub fn job_due(&mut self, end: End, token: u64) {
        match end {
            End::Source => {
                if self
                    .source
                    .job
                    .as_ref()
                    .is_none_or(|job| job.token != token)
                {
                    return;
                }
                self.source_effect();
                let number = self.source.started - 1;
                if self.dies(End::Source, number, Around::Within) {
                    return;
                }
                if let Some(job) = self.source.job.take() {
                    let answer = self.source_answer(job);
                    self.source_input(answer);
                }
                self.dies(End::Source, number, Around::After);
            }
            End::Destination => {
                let job = self.destination.job.as_ref();
                if job.is_none_or(|job| job.token != token) {
                    return;
                }
                self.destination_effect();
                let number = self.destination.started - 1;
                if self.dies(End::Destination, number, Around::Within) {
                    return;
                }
                if self.load_waits.is_empty() {
                    self.answer_destination();
                    self.dies(End::Destination, number, Around::After);
                }
            }
        }
    }

    fn source_effect(&mut self) {
        let Some(job) = &mut self.source.job else {
            return;
        };
        if std::mem::replace(&mut job.done, true) || job.fails {
            return;
        }
        match job.command.clone() {
            SourceCommand::Freeze => self.guest.source_runs = false,
            SourceCommand::SaveState => {
                self.states_saved += 1;
                self.guest.save_state(&mut self.rng);
            }
            SourceCommand::Journal(record) => self.source.journal.push(record),
            SourceCommand::Thaw => {
                assert!(
                    !self.guest.destination_ever_ran,
                    "thawed after the handover was accepted"
                );
                self.guest.thaw();
            }
            SourceCommand::Release => {
                assert!(self.guest.destination_ever_ran && self.guest.trapped.is_empty());
                assert!(!self.guest.source_runs);
            }
            _ => {}
        }
    }

    fn source_answer(&mut self, job: Job<SourceCommand>) -> SourceInput {
        if job.fails {
            return SourceInput::Failed {
                error: format!("{:?} failed", job.command),
            };
        }
        match job.command {
            SourceCommand::StartTracking => {
                let content = self.guest.start_tracking();
                let accessed = self.guest.accessed(&mut self.rng);
                self.source_input(SourceInput::Accessed(accessed));
                SourceInput::Tracking(content)
            }
            SourceCommand::Scan => SourceInput::Dirty(self.guest.take_dirty(&mut self.rng)),
            SourceCommand::Freeze => SourceInput::Frozen {
                needed: self.guest.needed(),
            },
            SourceCommand::SaveState => SourceInput::StateSaved {
                len: self.scenario.state_len,
                hash: [self.states_saved as u8; 32],
            },
            SourceCommand::Journal(_) => SourceInput::Journaled,
            SourceCommand::Thaw => SourceInput::Thawed,
            SourceCommand::Release => SourceInput::Released,
            other => unreachable!("{other:?} has no answer"),
        }
    }

    fn destination_effect(&mut self) {
        let Some(job) = &mut self.destination.job else {
            return;
        };
        if std::mem::replace(&mut job.done, true) || job.fails {
            return;
        }
        match job.command.clone() {
            DestinationCommand::Prepare(offer) => {
                self.ledger = Some(Ledger::new(&offer.regions));
                self.guest.prepare(&mut self.rng);
            }
            DestinationCommand::Arm {
                behind,
                postcopy_pass,
            } => {
                if let Some(ledger) = &mut self.ledger {
                    let guest = &mut self.guest;
                    self.arm_missing = guest.arm(ledger, &behind, postcopy_pass);
                    self.armed = true;
                }
            }
            DestinationCommand::LoadState { len, hash } => self.load(len, hash),
            DestinationCommand::Journal(record) => self.destination.journal.push(record),
            DestinationCommand::Resume => {
                let last = self.destination.journal.last();
                assert!(
                    matches!(last, Some(DestinationRecord::Accepted { .. })),
                    "resumed without a durable acceptance"
                );
                let needed = self.guest.needed();
                let lacks = needed.intersection(&self.guest.trapped);
                assert!(
                    lacks.is_empty(),
                    "resumed without {lacks:?}, which cannot wait"
                );
                self.guest.vcpus.fill(None);
                self.guest.destination_runs = true;
                self.guest.destination_ever_ran = true;
            }
            DestinationCommand::Abandon => {
                assert!(!self.guest.destination_ever_ran, "abandoned while running");
                self.armed = false;
            }
            DestinationCommand::Disarm => assert!(self.guest.trapped.is_empty()),
            _ => {}
        }
    }

    /// Loading the state needs all of it, and touches some memory.
    fn load(&mut self, len: u64, hash: [u8; 32]) {
        let mut next = 0;
        for (offset, (piece, which)) in &self.state {
            assert_eq!(*offset, next, "a piece of the state is missing");
            assert_eq!([*which as u8; 32], hash, "a piece of another state");
            next += u64::from(*piece);
        }
        assert_eq!(next, len, "the state is not complete");
        let all = self.guest.blocks();
        for _ in 0..self.rng.random_range(0..4) {
            let block = all[self.rng.random_range(0..all.len())];
            if self.guest.trapped.contains(block.0, block.1) {
                self.load_waits.push(block);
                let (region, block) = block;
                self.destination_input(DestinationInput::Fault { region, block });
            } else {
                let here = self.guest.destination.read(block);
                assert_eq!(here, self.guest.truth(block), "the state loader reads");
            }
        }
    }

    /// Called when blocks have been placed.
    pub fn load_may_go_on(&mut self) {
        if self.load_waits.is_empty() {
            return;
        }
        let trapped = &self.guest.trapped;
        self.load_waits.retain(|(r, b)| trapped.contains(*r, *b));
        let loading = self.destination.job.as_ref();
        if self.load_waits.is_empty() && loading.is_some_and(|job| job.done) {
            let token = self.schedule(End::Destination);
            if let Some(job) = &mut self.destination.job {
                job.token = token;
            }
        }
    }

    fn answer_destination(&mut self) {
        let Some(job) = self.destination.job.take() else {
            return;
        };
        let answer = if job.fails {
            DestinationInput::Failed {
                error: format!("{:?} failed", job.command),
            }
        } else {
            self.destination_effect_answer(&job.command)
        };
        self.destination_input(answer);
    }

    fn destination_effect_answer(&mut self, command: &DestinationCommand) -> DestinationInput {
        match command {
            DestinationCommand::Check(_) => DestinationInput::Checked(Ok(Vec::new())),
            DestinationCommand::Prepare(_) => DestinationInput::Prepared,
            DestinationCommand::Arm { .. } => DestinationInput::Armed {
                missing: std::mem::take(&mut self.arm_missing),
            },
            DestinationCommand::LoadState { .. } => DestinationInput::Loaded,
            DestinationCommand::Journal(_) => DestinationInput::Journaled,
            DestinationCommand::Resume => DestinationInput::Resumed,
            DestinationCommand::Disarm => DestinationInput::Disarmed,
            DestinationCommand::Abandon => DestinationInput::Abandoned,
            other => unreachable!("{other:?} has no answer"),
        }
    }
}
