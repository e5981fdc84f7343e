// SPDX-License-Identifier: GPL-2.0

//! Frames over a stream socket: each behind its length, 32 bits, big-endian. So do QEMU's "stream" network and
//! `passt`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{read, Errno};
use rustix::net::{send, SendFlags};

use super::{HEADER, LONGEST_FRAME, SHORTEST_FRAME};

/// The bytes of a length.
const LENGTH: usize = 4;
/// The bytes that are read ahead: one frame, whatever its length, and many short ones.
const AHEAD: usize = 2 * (LENGTH + LONGEST_FRAME);

/// The other end is gone, or what it sends is no frame.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Gone;

/// One end of the stream. The socket does not block.
pub(super) struct Stream {
    socket: OwnedFd,
    /// What was read is at `start..end`.
    input: Box<[u8]>,
    start: usize,
    end: usize,
    /// The rest of a frame of which the socket has taken a part.
    rest: Vec<u8>,
}

impl Stream {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            input: vec![0; AHEAD].into_boxed_slice(),
            start: 0,
            end: 0,
            rest: Vec::new(),
        }
    }

    /// The next frame, or none where none has come whole. It stays the next until [`Self::take`].
    pub(super) fn front(&mut self) -> Result<Option<&[u8]>, Gone> {
        loop {
            if let Some(length) = self.length()? {
                let from = self.start + LENGTH;
                if self.end - from >= length {
                    return Ok(self.input.get(from..from + length));
                }
            }
            if self.start > 0 {
                self.input.copy_within(self.start..self.end, 0);
                self.end -= self.start;
                self.start = 0;
            }
            // There is room: the input has twice that of the longest frame, and none is whole.
            match read(&self.socket, &mut self.input[self.end..]) {
                Ok(0) => return Err(Gone),
                Ok(count) => self.end += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(_) => return Err(Gone),
            }
        }
    }

    /// The next frame is done with, where there is one.
    pub(super) fn take(&mut self) {
        if let Ok(Some(length)) = self.length() {
            let end = self.start + LENGTH + length;
            if end <= self.end {
                self.start = end;
            }
        }
    }

    /// The length of the next frame, where it has come.
    fn length(&self) -> Result<Option<usize>, Gone> {
        let waiting = self.input.get(self.start..self.end).unwrap_or_default();
        let Some(bytes) = waiting.first_chunk::<LENGTH>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*bytes) as usize;
        let right = (SHORTEST_FRAME..=LONGEST_FRAME).contains(&length);
        right.then_some(Some(length)).ok_or(Gone)
    }

    /// Sends the frame behind the virtio header that `packet` begins with; the header is overwritten. Says
    /// whether the frame was taken: one that was not can be sent again when the socket can be written.
    pub(super) fn send(&mut self, packet: &mut [u8]) -> Result<bool, Gone> {
        if !self.flush()? {
            return Ok(false);
        }
        let Some(frame) = packet
            .len()
            .checked_sub(HEADER)
            .filter(|frame| *frame >= SHORTEST_FRAME)
        else {
            return Ok(true);
        };
        // The length takes the place of the header's end.
        let bytes = &mut packet[HEADER - LENGTH..];
        bytes[..LENGTH].copy_from_slice(&(frame as u32).to_be_bytes());
        let count = self.write(bytes)?;
        if count > 0 {
            self.rest.extend_from_slice(&bytes[count..]);
        }
        Ok(count > 0)
    }

    /// Sends what was left of the last frame. Says whether nothing is left.
    pub(super) fn flush(&mut self) -> Result<bool, Gone> {
        if !self.rest.is_empty() {
            let count = self.write(&self.rest)?;
            self.rest.drain(..count);
        }
        Ok(self.rest.is_empty())
    }

    /// Whether there is something to flush.
    pub(super) fn has_rest(&self) -> bool {
        !self.rest.is_empty()
    }

    fn write(&self, bytes: &[u8]) -> Result<usize, Gone> {
        loop {
            match send(&self.socket, bytes, SendFlags::NOSIGNAL) {
                Ok(count) => return Ok(count),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN | Errno::NOBUFS) => return Ok(0),
                Err(_) => return Err(Gone),
            }
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
