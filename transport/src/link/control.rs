//! The control lane: one bidirectional stream of messages, in order. Copies of what the guest waits for
//! come beside it on the urgent lane, so that a lost packet costs no round trip.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use tokio::sync::Notify;

use super::Shared;
use super::outbound::Outbound;
use crate::error::{CloseCode, LinkError};
use crate::frame::{FrameError, PREFIX, decode_length, decode_message, encode_frame};
use crate::lane::Lane;
use crate::message::Message;

/// Sends messages, in order.
pub struct ControlSender {
    shared: Arc<Shared>,
    stream: quinn::SendStream,
    outbound: Outbound,
    /// Bytes of the stream so far.
    sent: u64,
}

/// Receives messages, in order.
pub struct ControlReceiver {
    shared: Arc<Shared>,
    stream: quinn::RecvStream,
    copies: Arc<Copies>,
    /// Bytes of the stream that were put into the buffer.
    position: u64,
    /// What has arrived of messages that were not taken yet; at most one message and [`READ`].
    buffer: Vec<u8>,
}

/// Bytes taken off the stream at once.
const READ: usize = 64 << 10;
/// Bytes before the contents of a copy: their place in the stream.
const OFFSET: usize = 8;
/// Copies of what has not come yet are kept up to this many bytes. Others are dropped: the stream brings
/// it all.
const MAX_COPIES: usize = 256 << 10;

/// Copies of parts of the stream that have arrived.
#[derive(Default)]
pub(super) struct Copies {
    waiting: Mutex<VecDeque<(u64, Bytes)>>,
    arrived: Notify,
}

impl Copies {
    fn lock(&self) -> MutexGuard<'_, VecDeque<(u64, Bytes)>> {
        // Whole copies are pushed and taken: sound even after a panic elsewhere.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a copy: its place, then its contents.
    pub(super) fn take(&self, copy: &Bytes) -> Result<(), String> {
        let (offset, contents) = copy
            .split_first_chunk::<OFFSET>()
            .filter(|(_, contents)| !contents.is_empty())
            .ok_or("an empty copy of control messages")?;
        let offset = u64::from_le_bytes(*offset);
        let mut waiting = self.lock();
        let held: usize = waiting.iter().map(|(_, contents)| contents.len()).sum();
        if held + contents.len() <= MAX_COPIES {
            waiting.push_back((offset, copy.slice(OFFSET..)));
            drop(waiting);
            self.arrived.notify_one();
        }
        Ok(())
    }

    /// What follows on `position`, if a copy has it. Those of what is before are dropped.
    fn after(&self, position: u64) -> Option<Bytes> {
        let end = |(offset, contents): &(u64, Bytes)| offset.saturating_add(contents.len() as u64);
        let mut waiting = self.lock();
        waiting.retain(|copy| end(copy) > position);
        let next = waiting.iter().position(|(offset, _)| *offset <= position)?;
        let (offset, contents) = waiting.remove(next)?;
        Some(contents.slice((position - offset) as usize..))
    }
}

pub(super) async fn open(
    shared: Arc<Shared>,
    outbound: Outbound,
    copies: Arc<Copies>,
) -> Result<(ControlSender, ControlReceiver), LinkError> {
    let streams = shared.connection.open_bi().await;
    pair(shared, outbound, copies, streams)
}

pub(super) async fn accept(
    shared: Arc<Shared>,
    outbound: Outbound,
    copies: Arc<Copies>,
) -> Result<(ControlSender, ControlReceiver), LinkError> {
    let streams = shared.connection.accept_bi().await;
    pair(shared, outbound, copies, streams)
}

fn pair(
    shared: Arc<Shared>,
    outbound: Outbound,
    copies: Arc<Copies>,
    streams: Result<(quinn::SendStream, quinn::RecvStream), quinn::ConnectionError>,
) -> Result<(ControlSender, ControlReceiver), LinkError> {
    let (send, receive) = streams.map_err(|error| shared.explain(error))?;
    send.set_priority(Lane::Control.priority())
        .map_err(|_| shared.error())?;
    Ok((
        ControlSender {
            shared: shared.clone(),
            stream: send,
            outbound,
            sent: 0,
        },
        ControlReceiver {
            shared,
            stream: receive,
            copies,
            position: 0,
            buffer: Vec::new(),
        },
    ))
}

impl ControlSender {
    /// Sends a message. Returns when QUIC has it, which says nothing about its arrival. After an
    /// error, or when the future was dropped, the stream must not be used again.
    pub async fn send(&mut self, message: &Message) -> Result<(), LinkError> {
        let frame =
            encode_frame(message).map_err(|error| LinkError::Unsendable(error.to_string()))?;
        self.write(&frame).await
    }

    /// Sends a message as [`Self::send`] does, and a copy of it on the urgent lane, if it is not long: for
    /// messages that a guest waits for. The receiver still takes all messages in order, each once.
    pub async fn send_twice(&mut self, message: &Message) -> Result<(), LinkError> {
        let frame =
            encode_frame(message).map_err(|error| LinkError::Unsendable(error.to_string()))?;
        let mut copy = BytesMut::with_capacity(OFFSET + frame.len());
        copy.extend_from_slice(&self.sent.to_le_bytes());
        copy.extend_from_slice(&frame);
        self.write(&frame).await?;
        self.outbound.send_copy(copy.freeze());
        Ok(())
    }

    async fn write(&mut self, frame: &[u8]) -> Result<(), LinkError> {
        let written = self.stream.write_all(frame).await;
        written.map_err(|error| match error {
            quinn::WriteError::Stopped(_) => self
                .shared
                .violation("it stopped reading the control stream"),
            _ => self.shared.error(),
        })?;
        self.sent += frame.len() as u64;
        Ok(())
    }

    /// Says that no message follows and waits until the peer has received all of them.
    pub async fn finish(&mut self) -> Result<(), LinkError> {
        // A stream that was finished before only has to be waited for.
        let _already = self.stream.finish();
        self.stream
            .stopped()
            .await
            .map(|_| ())
            .map_err(|_| self.shared.error())
    }
}

impl ControlReceiver {
    /// Receives the next message. Cancel-safe: a message that has arrived in part stays here.
    pub async fn recv(&mut self) -> Result<Message, LinkError> {
        loop {
            if let Some(message) = self.buffered()? {
                return Ok(message);
            }
            if let Some(copy) = self.copies.after(self.position) {
                self.append(self.position, &copy);
                continue;
            }
            let chunk = tokio::select! {
                chunk = self.stream.read_chunk(READ, true) => chunk,
                () = self.copies.arrived.notified() => continue,
            };
            match chunk {
                Ok(Some(chunk)) => self.append(chunk.offset, &chunk.bytes),
                Ok(None) if self.buffer.is_empty() => {
                    return Err(LinkError::PeerClosed {
                        peer: self.shared.addr(),
                        code: CloseCode::DONE.0,
                        reason: "it has no more to say".to_owned(),
                    });
                }
                Ok(None) | Err(quinn::ReadError::Reset(_)) => {
                    return Err(self
                        .shared
                        .violation("it ended the control stream in a message"));
                }
                Err(_) => return Err(self.shared.error()),
            }
        }
    }

    /// Takes a part of the stream that begins no later than what is lacking; what a copy has brought
    /// before is dropped.
    fn append(&mut self, offset: u64, bytes: &[u8]) {
        let known = self.position.saturating_sub(offset) as usize;
        let new = bytes.get(known..).unwrap_or_default();
        self.buffer.extend_from_slice(new);
        self.position += new.len() as u64;
    }

    /// Takes a message out of what has arrived, if one is complete.
    fn buffered(&mut self) -> Result<Option<Message>, LinkError> {
        let Some((prefix, rest)) = self.buffer.split_first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let violation = |error: FrameError| self.shared.violation(error.to_string());
        let len = decode_length(*prefix).map_err(violation)?;
        let Some(body) = rest.get(..len) else {
            return Ok(None);
        };
        let message = decode_message(body).map_err(violation)?;
        self.buffer.drain(..PREFIX + len);
        Ok(Some(message))
    }
}
