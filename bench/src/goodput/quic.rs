//! hybridmig's transport between two hosts: batches on the bulk lane, faults on the urgent one.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use hybridmig_transport::identity::Identity;
use hybridmig_transport::link::{Incoming, Link as QuicLink};
use hybridmig_transport::message::{Message, RegionId};
use hybridmig_transport::trust::Trust;
use hybridmig_transport::{Congestion, Endpoint, Lane, TransportConfig};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

use super::{FAULTS_AT_ONCE, Flow, PAGE, PAUSE_MS, PIECE};
use crate::link::{Link, Side};
use crate::micro::noise;

/// UDP port of the receiver, in a namespace of its own.
const PORT: u16 = 4433;

/// Bytes before a page that say which request it answers.
const NUMBER: usize = 8;

/// A transfer under way; dropping it ends both hosts' tasks.
pub(super) struct QuicFlow {
    state: Arc<State>,
    // The order matters: links go before what they run on.
    links: [QuicLink; 2],
    _endpoints: [Endpoint; 2],
    runtimes: Vec<Runtime>,
}

#[derive(Default)]
struct State {
    received: AtomicU64,
    latencies: Mutex<Vec<f64>>,
    waiting: Mutex<HashMap<u64, oneshot::Sender<()>>>,
    broken: Mutex<Option<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Flow for QuicFlow {
    fn received(&self) -> u64 {
        self.state.received.load(Ordering::Relaxed)
    }

    fn latencies(&self) -> Vec<f64> {
        lock(&self.state.latencies).clone()
    }

    fn broken(&self) -> Option<String> {
        lock(&self.state.broken).clone()
    }
}

impl Drop for QuicFlow {
    fn drop(&mut self) {
        for link in &self.links {
            link.close(hybridmig_transport::error::CloseCode::SHUTDOWN, "measured");
        }
        for runtime in self.runtimes.drain(..) {
            runtime.shutdown_background();
        }
    }
}

/// Connects and starts.
pub(super) fn start(link: &Link, congestion: Congestion, faults: bool) -> Result<QuicFlow> {
    // Threads stay in the namespace of the thread that starts them.
    let runtime = |side| -> Result<Runtime> {
        let made = link.run(side, || {
            tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()
        })?;
        made.context("cannot start an async runtime")
    };
    let (near, far) = (runtime(Side::Source)?, runtime(Side::Destination)?);
    let (source, destination) = (Identity::generate()?, Identity::generate()?);
    let trust = |identity: &Identity| Trust::new().with_peer(identity.fingerprint());
    let config = TransportConfig {
        congestion,
        ..TransportConfig::default()
    };
    let address = SocketAddr::from((link.address(Side::Destination), PORT));
    let (server, client) = (trust(&source), trust(&destination));
    let (far_config, near_config) = (config.clone(), config);
    // Endpoints are made by the runtimes' own threads, which are where they should be.
    let server = far.block_on(
        far.spawn(async move { Endpoint::server(address, &destination, server, &far_config) }),
    )??;
    let accepting = far.spawn(async move {
        let accepted = server.accept().await;
        (server, accepted)
    });
    let (client, connected) = near.block_on(near.spawn(async move {
        let client = Endpoint::client(&source, client, &near_config)?;
        let connected = client.connect(address).await;
        anyhow::Ok((client, connected))
    }))??;
    let (server, accepted) = far.block_on(accepting)?;
    let (source, destination) = (connected?, accepted?);
    let state = Arc::new(State::default());
    near.spawn(watched(state.clone(), send(source.clone())));
    near.spawn(watched(state.clone(), answer(source.clone())));
    far.spawn(watched(
        state.clone(),
        receive(destination.clone(), state.clone()),
    ));
    if faults {
        for thread in 0..FAULTS_AT_ONCE {
            let fault = fault(destination.clone(), state.clone(), thread);
            far.spawn(watched(state.clone(), fault));
        }
    }
    Ok(QuicFlow {
        state,
        links: [source, destination],
        _endpoints: [client, server],
        runtimes: vec![near, far],
    })
}

/// Writes down why a task has ended.
async fn watched(state: Arc<State>, task: impl Future<Output = Result<()>>) {
    let ended = task.await;
    let why = ended.err().unwrap_or_else(|| anyhow!("a task has ended"));
    lock(&state.broken).get_or_insert(format!("{why:#}"));
}

async fn send(link: QuicLink) -> Result<()> {
    let piece = Bytes::from(noise(1, PIECE));
    loop {
        link.send_batch(Lane::Bulk, piece.clone()).await?;
    }
}

/// Answers faults with pages.
async fn answer(link: QuicLink) -> Result<()> {
    let page = noise(2, PAGE);
    loop {
        if let Incoming::Message(Message::Fetch { blocks, .. }) = link.next_incoming().await? {
            for block in blocks {
                let mut reply = Vec::with_capacity(NUMBER + PAGE);
                reply.extend_from_slice(&u64::from(block).to_be_bytes());
                reply.extend_from_slice(&page);
                link.send_batch(Lane::Urgent, reply.into()).await?;
            }
        }
    }
}

async fn receive(link: QuicLink, state: Arc<State>) -> Result<()> {
    loop {
        match link.next_incoming().await? {
            Incoming::Batch {
                lane: Lane::Urgent,
                bytes,
            } => {
                let number = bytes.first_chunk().context("an answer without a number")?;
                let waiting = lock(&state.waiting).remove(&u64::from_be_bytes(*number));
                if let Some(waiting) = waiting {
                    // Whoever waited may have been ended.
                    let _ = waiting.send(());
                }
            }
            Incoming::Batch { bytes, .. } => {
                let length = bytes.len() as u64;
                state.received.fetch_add(length, Ordering::Relaxed);
            }
            Incoming::Message(message) => return Err(anyhow!("unexpected: {message:?}")),
        }
    }
}

/// A vCPU that touches a missing page now and then.
async fn fault(link: QuicLink, state: Arc<State>, thread: u64) -> Result<()> {
    let mut rng = SmallRng::seed_from_u64(thread);
    for count in 0.. {
        // The guest's own work between two faults.
        let pause = rng.random_range(PAUSE_MS);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        let number = thread + FAULTS_AT_ONCE * count;
        let (sender, answered) = oneshot::channel();
        lock(&state.waiting).insert(number, sender);
        let asked = Instant::now();
        let request = Message::Fetch {
            region: RegionId(0),
            blocks: vec![u32::try_from(number).context("too many faults")?],
        };
        link.send_message(Lane::Urgent, &request).await?;
        answered.await.context("the answer will not come")?;
        lock(&state.latencies).push(asked.elapsed().as_secs_f64());
    }
    Ok(())
}
