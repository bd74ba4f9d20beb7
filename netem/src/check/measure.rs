//! The measurements of [`check`](super): pings, counted packets, a flood. Sending is paced by the clock;
//! receiving ends when nothing more can come.

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use super::Ends;
use crate::model::UDP_OVERHEAD;
use crate::sys::{self, BATCH, Batch};

/// Time between two pings: an idle link, but not an idle emulator.
const PING_INTERVAL: Duration = Duration::from_millis(5);

/// Packets handed to the kernel as one, where it can cut them.
const SEGMENTS: usize = 40;

/// The finest pause of a paced sender.
const PAUSE: Duration = Duration::from_micros(500);

/// Read and written at a time over TCP, in bytes.
const TCP_BUFFER: usize = 256 << 10;

/// What a flood came to.
#[derive(Clone, Copy, Debug)]
pub struct Throughput {
    /// IP-level bits per second at the receiver.
    pub bits_per_second: f64,
    /// The same at the sender.
    pub offered: f64,
    /// Packets that it was measured by.
    pub packets: u64,
    /// Time from the first to the last of them.
    pub seconds: f64,
}

/// Round-trip times of those pings that came back within `patience` of the last.
pub fn round_trips(
    ends: &Ends,
    pings: usize,
    payload: usize,
    patience: Duration,
) -> io::Result<Vec<Duration>> {
    let mut times = Vec::with_capacity(pings);
    thread::scope(|scope| {
        let echo = scope.spawn(|| echo(&ends.far, pings as u64, patience));
        let mut sent: HashMap<u64, Instant> = HashMap::new();
        let mut buffer = [0; 2048];
        let mut packet = vec![0; payload.max(8)];
        let start = Instant::now();
        let mut deadline = start + patience;
        let mut next = 0;
        while Instant::now() < deadline && (next < pings || times.len() < pings) {
            let due = start + PING_INTERVAL * next as u32;
            if next < pings && Instant::now() >= due {
                packet[..8].copy_from_slice(&(next as u64).to_be_bytes());
                sent.insert(next as u64, Instant::now());
                ends.near.send(&packet)?;
                next += 1;
                deadline = Instant::now() + patience;
                continue;
            }
            let until = if next < pings { due } else { deadline };
            let left = until.saturating_duration_since(Instant::now());
            if let Some(length) = receive(&ends.near, &mut buffer, left)?
                && let Some(number) = buffer[..length].first_chunk()
                && let Some(at) = sent.remove(&u64::from_be_bytes(*number))
            {
                times.push(at.elapsed());
            }
        }
        echo.join()
            .map_err(|_| io::Error::other("the echo panicked"))??;
        Ok(times)
    })
}

/// Sends back what comes, until all have or nothing does for as long as `patience`.
fn echo(socket: &UdpSocket, expected: u64, patience: Duration) -> io::Result<()> {
    let mut buffer = [0; 2048];
    for _ in 0..expected {
        if !wait(socket, patience)? {
            return Ok(());
        }
        let (length, from) = socket.recv_from(&mut buffer)?;
        socket.send_to(&buffer[..length], from)?;
    }
    Ok(())
}

/// How many of `packets` distinct ones, sent at `pace` per second, arrive at the far end.
pub fn arrivals(
    ends: &Ends,
    packets: u64,
    payload: usize,
    pace: f64,
    patience: Duration,
) -> io::Result<u64> {
    sys::grow_buffers(&ends.far, 8 << 20)?;
    thread::scope(|scope| {
        let receiver = scope.spawn(move || -> io::Result<u64> {
            // Copies count once.
            let mut seen = vec![false; packets as usize];
            let mut batch = Batch::new();
            while wait(&ends.far, patience)? {
                batch.receive(&ends.far)?;
                for (datagram, _) in batch.datagrams() {
                    let number = datagram.first_chunk().map(|n| u64::from_be_bytes(*n));
                    if let Some(seen) = number.and_then(|n| seen.get_mut(n as usize)) {
                        *seen = true;
                    }
                }
            }
            Ok(seen.iter().filter(|seen| **seen).count() as u64)
        });
        let mut packet = vec![0; payload.max(8)];
        paced(packets, pace, |number| {
            packet[..8].copy_from_slice(&number.to_be_bytes());
            ends.near.send(&packet).map(|_| ())
        })?;
        let received = receiver.join();
        received.map_err(|_| io::Error::other("the receiver panicked"))?
    })
}

/// Floods the link with `offered` IP-level bits per second for `time`.
pub fn throughput(
    ends: &Ends,
    payload: usize,
    offered: f64,
    time: Duration,
    patience: Duration,
) -> io::Result<Throughput> {
    sys::grow_buffers(&ends.far, 8 << 20)?;
    sys::grow_buffers(&ends.near, 8 << 20)?;
    let segmented = sys::segment(&ends.near, &ends.far, payload);
    let bits = (payload + UDP_OVERHEAD) as f64 * 8.0;
    thread::scope(|scope| {
        let receiver = scope.spawn(move || -> io::Result<(u64, f64)> {
            let mut batch = Batch::new();
            let mut first = None;
            let mut last = Instant::now();
            let mut packets = 0;
            while wait(&ends.far, patience)? {
                batch.receive(&ends.far)?;
                let bytes: usize = batch.datagrams().map(|(bytes, _)| bytes.len()).sum();
                let received = (bytes / payload) as u64;
                last = Instant::now();
                // The packets of the first receive came at no known time: they start the clock.
                if first.is_none() {
                    first = Some(last);
                } else {
                    packets += received;
                }
            }
            let seconds = first.map_or(0.0, |first| (last - first).as_secs_f64());
            Ok((packets, seconds))
        });
        let together = if segmented { SEGMENTS } else { 1 };
        let contents = vec![0; payload * together];
        let datagrams = [(contents.as_slice(), None); BATCH];
        let start = Instant::now();
        let mut sent = 0u64;
        while start.elapsed() < time {
            let due = (start.elapsed().as_secs_f64() * offered / bits) as u64;
            let count = due.saturating_sub(sent) as usize / together;
            if count == 0 {
                thread::sleep(PAUSE);
                continue;
            }
            let count = count.min(BATCH);
            // A full buffer is the sender's own limit, which the offered rate will show.
            match sys::send_batch(&ends.near, &datagrams[..count]) {
                Ok(count) => sent += (count * together) as u64,
                Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(PAUSE),
                Err(error) => return Err(error),
            }
        }
        let offered = sent as f64 * bits / start.elapsed().as_secs_f64();
        let received = receiver.join();
        let received = received.map_err(|_| io::Error::other("the receiver panicked"))?;
        let (packets, seconds) = received?;
        Ok(Throughput {
            bits_per_second: packets as f64 * bits / seconds.max(1e-9),
            offered,
            packets,
            seconds,
        })
    })
}

/// Bits per second that `receiver` reads of what `sender` writes for `time`.
pub fn tcp_throughput(
    mut sender: &TcpStream,
    mut receiver: &TcpStream,
    time: Duration,
) -> io::Result<f64> {
    thread::scope(|scope| {
        let reader = scope.spawn(move || -> io::Result<u64> {
            let mut buffer = vec![0; TCP_BUFFER];
            let mut bytes = 0;
            loop {
                match receiver.read(&mut buffer)? {
                    0 => return Ok(bytes),
                    read => bytes += read as u64,
                }
            }
        });
        let contents = vec![0; TCP_BUFFER];
        let start = Instant::now();
        while start.elapsed() < time {
            sender.write_all(&contents)?;
        }
        sender.shutdown(Shutdown::Write)?;
        let read = reader.join();
        let bytes = read.map_err(|_| io::Error::other("the reader panicked"))??;
        Ok(bytes as f64 * 8.0 / start.elapsed().as_secs_f64())
    })
}

/// Calls `send` for the numbers up to `count`, `pace` times a second.
fn paced(count: u64, pace: f64, mut send: impl FnMut(u64) -> io::Result<()>) -> io::Result<()> {
    let start = Instant::now();
    let mut sent = 0;
    while sent < count {
        let due = ((start.elapsed().as_secs_f64() * pace) as u64).min(count);
        if sent == due {
            thread::sleep(PAUSE);
        }
        while sent < due {
            send(sent)?;
            sent += 1;
        }
    }
    Ok(())
}

/// Whether there is something to receive, within `patience`.
fn wait(socket: &UdpSocket, patience: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + patience;
    loop {
        let mut polls = [sys::readable(socket)];
        let left = deadline.saturating_duration_since(Instant::now());
        sys::wait(&mut polls, Some(left))?;
        if polls[0].revents != 0 {
            return Ok(true);
        }
        if left.is_zero() {
            return Ok(false);
        }
    }
}

fn receive(socket: &UdpSocket, buffer: &mut [u8], patience: Duration) -> io::Result<Option<usize>> {
    if wait(socket, patience)? {
        socket.recv(buffer).map(Some)
    } else {
        Ok(None)
    }
}
