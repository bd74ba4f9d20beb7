//! The two threads of a relay. Each drives one [`Link`]: take what has come in, deliver what is due,
//! sleep until the next of either. They share one loop and differ in where packets come from and go to.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Client, DirectionState, Shared};
use crate::model::{Arrival, Link, UDP_OVERHEAD};
use crate::runner::{Counters, Schedule, lock};
use crate::sys::{self, BATCH, Batch};

/// Receives in a row before packets that are due get their turn.
const BATCHES_PER_TURN: usize = 4;

/// Payload buffers that are kept for reuse: no allocation per packet.
const SPARE_BUFFERS: usize = 4096;

/// Largest of them.
const SPARE_LENGTH: usize = 2048;

/// A datagram on its way.
#[derive(Clone, Debug)]
pub(super) struct Packet {
    client: Arc<Client>,
    payload: Vec<u8>,
}

/// Clients → target.
pub(super) fn forward(shared: &Shared, link: Link<Packet>) {
    let mut runner = Runner::new(shared, &shared.forward, link, false);
    runner.run(
        |runner, batch, _| {
            runner.take_in(batch, &shared.listener, |sender| {
                let client = shared.client(sender?).ok()?;
                let seen = shared.now().as_millis() as u64;
                client.last_seen.store(seen, Ordering::Relaxed);
                Some(client)
            });
        },
        |_| vec![sys::readable(&shared.listener)],
        |packets| {
            // All packets of one send go through the socket of one client.
            let client = &packets[0].client;
            let same = |packet: &&Packet| Arc::ptr_eq(&packet.client, client);
            let datagrams: Vec<_> = packets
                .iter()
                .take(BATCH)
                .take_while(same)
                .map(|packet| (packet.payload.as_slice(), None))
                .collect();
            sys::send_batch(&client.upstream, &datagrams)
        },
    );
}

/// Target → clients.
pub(super) fn back(shared: &Shared, link: Link<Packet>) {
    let mut runner = Runner::new(shared, &shared.back, link, true);
    runner.run(
        |runner, batch, ready| {
            let clients = std::mem::take(&mut runner.clients);
            for (client, _) in clients.iter().zip(ready).filter(|(_, ready)| **ready) {
                runner.take_in(batch, &client.upstream, |_| Some(Arc::clone(client)));
            }
            runner.clients = clients;
        },
        |clients| {
            let upstream = clients.iter().map(|client| &client.upstream);
            upstream.map(sys::readable).collect()
        },
        |packets| {
            let datagrams: Vec<_> = packets
                .iter()
                .take(BATCH)
                .map(|packet| (packet.payload.as_slice(), Some(&packet.client.answer_to)))
                .collect();
            sys::send_batch(&shared.listener, &datagrams)
        },
    );
}

struct Runner<'a> {
    shared: &'a Shared,
    state: &'a DirectionState,
    link: Link<Packet>,
    /// Packets that are due, and when they were.
    due: Vec<Packet>,
    due_times: Vec<Duration>,
    spare: Vec<Vec<u8>>,
    clients: Vec<Arc<Client>>,
    /// The change of the clients that was seen last.
    seen: Option<u64>,
    schedule: Schedule,
}

impl<'a> Runner<'a> {
    fn new(shared: &'a Shared, state: &'a DirectionState, link: Link<Packet>, back: bool) -> Self {
        Self {
            shared,
            state,
            link,
            due: Vec::new(),
            due_times: Vec::new(),
            spare: Vec::new(),
            clients: Vec::new(),
            seen: None,
            schedule: Schedule::new(back),
        }
    }

    /// The loop, until the relay stops. `take_in` reads from the sources that are ready, `sources`
    /// lists them, `send` sends some of the first packets and says how many.
    fn run(
        &mut self,
        take_in: impl Fn(&mut Self, &mut Batch, &[bool]),
        sources: impl Fn(&[Arc<Client>]) -> Vec<libc::pollfd>,
        send: impl Fn(&[Packet]) -> io::Result<usize>,
    ) {
        if !sys::prefer_latency() {
            tracing::debug!("the emulated link runs at ordinary priority");
        }
        let mut batch = Batch::new();
        let mut polls = Vec::new();
        let mut ready = Vec::new();
        while !self.shared.stopping.load(Ordering::Relaxed) {
            if self.look_at_changes() {
                polls = sources(&self.clients);
                polls.push(sys::readable(&self.state.wake));
            }
            let now = self.shared.now();
            self.follow_schedule(now);
            let next = self.link.next_due().into_iter();
            let next = next.chain(self.schedule.next_change()).min();
            let timeout = next.map(|next| next.saturating_sub(now));
            if let Err(error) = sys::wait(&mut polls, timeout) {
                tracing::error!(%error, "the emulated link cannot wait for packets and ends");
                return;
            }
            let (wake, sockets) = polls.split_last().expect("the wake was pushed above");
            if wake.revents != 0 {
                self.state.wake.clear();
            }
            ready.clear();
            ready.extend(sockets.iter().map(|poll| poll.revents != 0));
            if ready.contains(&true) {
                take_in(self, &mut batch, &ready);
            }
            self.deliver(&send);
        }
    }

    /// Does what the timeline and the handle ask for.
    fn follow_schedule(&mut self, now: Duration) {
        let Some((spec, down)) = self.schedule.follow(&self.shared.steering, now) else {
            return;
        };
        self.link.set_spec(now, &spec);
        if down != self.link.is_down() {
            let lost = self.link.set_down(down);
            Counters::add(&self.state.counters.dropped_down, lost as u64);
        }
    }

    /// Follows the list of clients; true if there was anything new.
    fn look_at_changes(&mut self) -> bool {
        let changes = self.shared.changes.load(Ordering::Acquire);
        if self.seen == Some(changes) {
            return false;
        }
        self.seen = Some(changes);
        self.clients = lock(&self.shared.clients)
            .values()
            .map(Arc::clone)
            .collect();
        true
    }

    /// Puts what `socket` has received onto the link.
    fn take_in(
        &mut self,
        batch: &mut Batch,
        socket: &UdpSocket,
        client_of: impl Fn(Option<SocketAddr>) -> Option<Arc<Client>>,
    ) {
        for _ in 0..BATCHES_PER_TURN {
            // An error here is an ICMP answer to something sent earlier (nobody listens at the
            // target yet, or no more): to a link that is just another lost packet.
            let received = batch.receive(socket).unwrap_or(0);
            let now = self.shared.now();
            for (payload, sender) in batch.datagrams() {
                match client_of(sender) {
                    Some(client) => self.push(now, client, payload),
                    None => Counters::add(&self.state.counters.dropped_relay, 1),
                }
            }
            if received < BATCH {
                break;
            }
        }
    }

    fn push(&mut self, now: Duration, client: Arc<Client>, payload: &[u8]) {
        let counters = &self.state.counters;
        let bytes = payload.len() + UDP_OVERHEAD;
        Counters::add(&counters.packets, 1);
        Counters::add(&counters.bytes, bytes as u64);
        let mut buffer = self.spare.pop().unwrap_or_default();
        buffer.clear();
        buffer.extend_from_slice(payload);
        let packet = Packet {
            client,
            payload: buffer,
        };
        let held = self.link.in_flight();
        match self.link.push(now, bytes, packet) {
            Ok(_) => Counters::add(
                &counters.duplicated,
                (self.link.in_flight() - held) as u64 - 1,
            ),
            Err(why) => counters.dropped(why),
        }
    }

    /// Sends what is due.
    fn deliver(&mut self, send: &impl Fn(&[Packet]) -> io::Result<usize>) {
        let now = self.shared.now();
        while let Some(arrival) = self.link.pop_due(now) {
            let Arrival {
                due,
                mut packet,
                corrupt,
            } = arrival;
            if let Some(random) = corrupt
                && !packet.payload.is_empty()
            {
                let bit = (random % (packet.payload.len() as u64 * 8)) as usize;
                packet.payload[bit / 8] ^= 1 << (bit % 8);
                Counters::add(&self.state.counters.corrupted, 1);
            }
            self.due.push(packet);
            self.due_times.push(due);
        }
        let mut sent = 0;
        while sent < self.due.len() {
            let counters = &self.state.counters;
            // An error may be the ICMP answer to an earlier packet, which this one need not suffer for.
            let Ok(count) = send(&self.due[sent..]).or_else(|_| send(&self.due[sent..])) else {
                // Full buffers: the first packet of the batch is lost.
                Counters::add(&counters.dropped_relay, 1);
                sent += 1;
                continue;
            };
            let now = self.shared.now();
            for i in sent..sent + count {
                let bytes = self.due[i].payload.len() + UDP_OVERHEAD;
                counters.delivered(1, bytes as u64, now.saturating_sub(self.due_times[i]));
            }
            sent += count;
        }
        for packet in self.due.drain(..) {
            if self.spare.len() < SPARE_BUFFERS && packet.payload.capacity() <= SPARE_LENGTH {
                self.spare.push(packet.payload);
            }
        }
        self.due_times.clear();
    }
}
