// SPDX-License-Identifier: GPL-2.0

//! Frames over a stream socket: each behind its length, 32 bits, big-endian. So do QEMU's "stream" network and
//! `passt`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{read, retry_on_intr, Errno};
use rustix::net::{send, SendFlags};

use super::link::{Gone, Wire};
use super::{HEADER, LONGEST_FRAME, SHORTEST_FRAME};

/// The bytes of a length.
const LENGTH: usize = 4;
/// The bytes that are read ahead: one frame, whatever its length, and many short ones.
const AHEAD: usize = 2 * (LENGTH + LONGEST_FRAME);

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

    /// The frame at the start of what was read, where it is whole.
    fn whole(&self) -> Result<Option<&[u8]>, Gone> {
        let waiting = self.input.get(self.start..self.end).unwrap_or_default();
        let Some((length, frames)) = waiting.split_first_chunk::<LENGTH>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*length) as usize;
        if !(SHORTEST_FRAME..=LONGEST_FRAME).contains(&length) {
            return Err(Gone);
        }
        Ok(frames.get(..length))
    }

    fn write(&self, bytes: &[u8]) -> Result<usize, Gone> {
        match retry_on_intr(|| send(&self.socket, bytes, SendFlags::NOSIGNAL)) {
            Err(Errno::AGAIN | Errno::NOBUFS) => Ok(0),
            count => count.map_err(|_| Gone),
        }
    }
}

impl Wire for Stream {
    fn fill(&mut self) -> Result<bool, Gone> {
        loop {
            if self.whole()?.is_some() {
                return Ok(true);
            }
            if self.start > 0 {
                self.input.copy_within(self.start..self.end, 0);
                self.end -= self.start;
                self.start = 0;
            }
            // There is room: the input has twice that of the longest frame, and none is whole.
            match retry_on_intr(|| read(&self.socket, &mut self.input[self.end..])) {
                Ok(0) => return Err(Gone),
                Ok(count) => self.end += count,
                Err(Errno::AGAIN) => return Ok(false),
                Err(_) => return Err(Gone),
            }
        }
    }

    fn frame(&self) -> Option<([u8; HEADER], &[u8])> {
        Some(([0; HEADER], self.whole().ok()??))
    }

    fn take(&mut self) {
        if let Ok(Some(frame)) = self.whole() {
            self.start += LENGTH + frame.len();
        }
    }

    fn send(&mut self, packet: &mut [u8]) -> Result<bool, Gone> {
        if !self.flush()? {
            return Ok(false);
        }
        if packet.len() < HEADER + SHORTEST_FRAME {
            return Ok(true);
        }
        let length = (packet.len() - HEADER) as u32;
        // The length takes the place of the header's end.
        let bytes = &mut packet[HEADER - LENGTH..];
        bytes[..LENGTH].copy_from_slice(&length.to_be_bytes());
        let count = self.write(bytes)?;
        if count > 0 {
            self.rest.extend_from_slice(&bytes[count..]);
        }
        Ok(count > 0)
    }

    fn flush(&mut self) -> Result<bool, Gone> {
        if !self.rest.is_empty() {
            let count = self.write(&self.rest)?;
            self.rest.drain(..count);
        }
        Ok(self.rest.is_empty())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
