//! The kernel's TCP between two hosts: one connection for the bulk, one for each thread that faults, as
//! QEMU's `postcopy-preempt` has a connection of its own for pages.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

use super::{FAULTS_AT_ONCE, Flow, PAGE, PAUSE_MS, PIECE};
use crate::link::{Link, Side};
use crate::micro::noise;

/// TCP port of the receiver, in a namespace of its own.
const PORT: u16 = 4434;

/// Length of a request for a page, in bytes.
const REQUEST: usize = 8;

/// A transfer under way; dropping it ends its connections and threads.
pub(super) struct TcpFlow {
    state: Arc<State>,
    streams: Vec<TcpStream>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    received: AtomicU64,
    latencies: Mutex<Vec<f64>>,
    ending: AtomicBool,
    broken: Mutex<Option<String>>,
}

impl Flow for TcpFlow {
    fn received(&self) -> u64 {
        self.state.received.load(Ordering::Relaxed)
    }

    fn latencies(&self) -> Vec<f64> {
        let latencies = self.state.latencies.lock();
        latencies.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn broken(&self) -> Option<String> {
        let broken = self.state.broken.lock();
        broken.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for TcpFlow {
    fn drop(&mut self) {
        self.state.ending.store(true, Ordering::Relaxed);
        for stream in &self.streams {
            if let Err(error) = stream.shutdown(Shutdown::Both)
                && error.kind() != ErrorKind::NotConnected
            {
                eprintln!("a connection cannot be ended: {error}");
            }
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                eprintln!("a thread of the transfer panicked");
            }
        }
    }
}

/// Connects and starts.
pub(super) fn start(link: &Link, control: &str, faults: bool) -> Result<TcpFlow> {
    link.set_congestion(control)?;
    let address = SocketAddr::from((link.address(Side::Destination), PORT));
    let listener = link.run(Side::Destination, || TcpListener::bind(address))?;
    let listener = listener.context("cannot listen")?;
    let mut flow = TcpFlow {
        state: Arc::default(),
        streams: Vec::new(),
        threads: Vec::new(),
    };
    let (source, destination) = flow.connect(link, &listener, address)?;
    flow.spawn(move |_| send(source));
    flow.spawn(move |state| receive(destination, state));
    if faults {
        for thread in 0..FAULTS_AT_ONCE {
            let (source, destination) = flow.connect(link, &listener, address)?;
            flow.spawn(move |_| answer(source));
            flow.spawn(move |state| fault(destination, state, thread));
        }
    }
    Ok(flow)
}

impl TcpFlow {
    /// The two ends of a new connection.
    fn connect(
        &mut self,
        link: &Link,
        listener: &TcpListener,
        address: SocketAddr,
    ) -> Result<(TcpStream, TcpStream)> {
        let near = link.run(Side::Source, || TcpStream::connect(address))?;
        let near = near.context("cannot connect")?;
        let (far, _) = listener.accept().context("cannot accept")?;
        for stream in [&near, &far] {
            stream.set_nodelay(true)?;
            self.streams.push(stream.try_clone()?);
        }
        Ok((near, far))
    }

    fn spawn(&mut self, task: impl FnOnce(&State) -> Result<()> + Send + 'static) {
        let state = self.state.clone();
        self.threads.push(std::thread::spawn(move || {
            let ended = task(&state);
            if state.ending.load(Ordering::Relaxed) {
                return;
            }
            let why = ended.map_or_else(
                |error| format!("{error:#}"),
                |()| "a connection has ended".to_owned(),
            );
            let broken = state.broken.lock();
            broken
                .unwrap_or_else(PoisonError::into_inner)
                .get_or_insert(why);
        }));
    }
}

fn send(mut stream: TcpStream) -> Result<()> {
    let piece = noise(1, PIECE);
    loop {
        stream.write_all(&piece)?;
    }
}

fn receive(mut stream: TcpStream, state: &State) -> Result<()> {
    let mut buffer = vec![0; PIECE];
    loop {
        let read = stream.read(&mut buffer)?;
        if read == 0 {
            return Ok(());
        }
        state.received.fetch_add(read as u64, Ordering::Relaxed);
    }
}

/// Answers requests with pages.
fn answer(mut stream: TcpStream) -> Result<()> {
    let page = noise(2, PAGE);
    let mut request = [0; REQUEST];
    loop {
        stream.read_exact(&mut request)?;
        stream.write_all(&page)?;
    }
}

/// A vCPU that touches a missing page now and then.
fn fault(mut stream: TcpStream, state: &State, thread: u64) -> Result<()> {
    let mut rng = SmallRng::seed_from_u64(thread);
    let mut page = vec![0; PAGE];
    loop {
        // The guest's own work between two faults.
        std::thread::sleep(Duration::from_millis(rng.random_range(PAUSE_MS)));
        let asked = Instant::now();
        stream.write_all(&[0; REQUEST])?;
        stream.read_exact(&mut page)?;
        let latencies = state.latencies.lock();
        latencies
            .unwrap_or_else(PoisonError::into_inner)
            .push(asked.elapsed().as_secs_f64());
    }
}
