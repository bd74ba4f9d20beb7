//! The control lane: one bidirectional stream of messages, in order.

use std::sync::Arc;

use super::Shared;
use crate::error::{CloseCode, LinkError};
use crate::frame::{FrameError, PREFIX, decode_length, decode_message, encode_frame};
use crate::lane::Lane;
use crate::message::Message;

/// Sends messages, in order.
pub struct ControlSender {
    shared: Arc<Shared>,
    stream: quinn::SendStream,
}

/// Receives messages, in order.
pub struct ControlReceiver {
    shared: Arc<Shared>,
    stream: quinn::RecvStream,
    /// What has arrived of messages that were not taken yet; at most one message and [`READ`].
    buffer: Vec<u8>,
}

/// Bytes taken off the stream at once.
const READ: usize = 64 << 10;

pub(super) async fn open(
    shared: Arc<Shared>,
) -> Result<(ControlSender, ControlReceiver), LinkError> {
    let streams = shared.connection.open_bi().await;
    pair(shared, streams)
}

pub(super) async fn accept(
    shared: Arc<Shared>,
) -> Result<(ControlSender, ControlReceiver), LinkError> {
    let streams = shared.connection.accept_bi().await;
    pair(shared, streams)
}

fn pair(
    shared: Arc<Shared>,
    streams: Result<(quinn::SendStream, quinn::RecvStream), quinn::ConnectionError>,
) -> Result<(ControlSender, ControlReceiver), LinkError> {
    let (send, receive) = streams.map_err(|error| shared.explain(error))?;
    send.set_priority(Lane::Control.priority())
        .map_err(|_| shared.error())?;
    Ok((
        ControlSender {
            shared: shared.clone(),
            stream: send,
        },
        ControlReceiver {
            shared,
            stream: receive,
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
        self.stream
            .write_all(&frame)
            .await
            .map_err(|error| match error {
                quinn::WriteError::Stopped(_) => self
                    .shared
                    .violation("it stopped reading the control stream"),
                _ => self.shared.error(),
            })
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
            let chunk = self.stream.read_chunk(READ, true).await;
            match chunk {
                Ok(Some(chunk)) => self.buffer.extend_from_slice(&chunk.bytes),
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
