//! What of a chunk is passed on.
//!
//! Most often all of it, in place. Leaves out why. Hazard: an insertion that lands inside of a message.

use bytes::BytesMut;
use pgherd_pgwire::frame::Header;

/// What is to be passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass<'a> {
    /// These bytes of what was received.
    AsItCame(&'a [u8]),
    /// What was appended to `edited`.
    Edited,
}

/// What became of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passed<'a> {
    pub pass: Pass<'a>,
    /// So many bytes were taken; the others, the beginning of a header, must come first in the next chunk.
    pub taken_bytes: usize,
}

/// Takes parts out of a chunk and puts others in. As long as only an end was cut off nothing is copied.
#[derive(Debug)]
pub(super) struct Cut<'a, 'b> {
    chunk: &'a [u8],
    /// From here on it is kept, up to where it is cut next.
    from: usize,
    edited: &'b mut BytesMut,
    is_edited: bool,
}

impl<'a, 'b> Cut<'a, 'b> {
    pub(super) fn new(chunk: &'a [u8], edited: &'b mut BytesMut) -> Cut<'a, 'b> {
        Cut { chunk, from: 0, edited, is_edited: false }
    }

    /// Leaves a part out.
    pub(super) fn skip(&mut self, begin: usize, end: usize) {
        if begin > self.from {
            self.edited.extend_from_slice(&self.chunk[self.from..begin]);
            self.is_edited = true;
        }
        self.from = end;
    }

    /// To be called behind a [`Cut::skip`].
    pub(super) fn insert(&mut self, write: impl FnOnce(&mut BytesMut)) {
        write(self.edited);
        self.is_edited = true;
    }

    /// So much stands in `edited` by now.
    pub(super) fn edited_bytes(&self) -> usize {
        self.edited.len()
    }

    pub(super) fn end(mut self, taken_bytes: usize) -> Passed<'a> {
        if !self.is_edited {
            let pass = Pass::AsItCame(&self.chunk[self.from.min(taken_bytes)..taken_bytes]);
            return Passed { pass, taken_bytes };
        }
        self.skip(taken_bytes, taken_bytes);
        Passed { pass: Pass::Edited, taken_bytes }
    }
}

/// A message, and the part of the chunk that it, or what came of it in this chunk, takes up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Message {
    pub(super) header: Header,
    pub(super) begin: usize,
    pub(super) end: usize,
    /// All of it is in this chunk.
    pub(super) is_here: bool,
}

impl Message {
    /// Leaves it out.
    pub(super) fn skip(&self, cut: &mut Cut<'_, '_>) {
        cut.skip(self.begin, self.end);
    }

    /// Passes it on; of one that came in parts nothing was passed on before.
    pub(super) fn keep(&self, body: &[u8], cut: &mut Cut<'_, '_>) {
        if !self.is_here {
            self.skip(cut);
            cut.insert(|to| {
                to.extend_from_slice(&self.header.to_bytes());
                to.extend_from_slice(body);
            });
        }
    }
}
