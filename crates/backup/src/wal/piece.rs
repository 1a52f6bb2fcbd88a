//! Pieces: what there is of a segment that is still being written.
//!
//! A segment is put when it is complete, which on an idle server may take a day, and nothing is overwritten. So what came since
//! the last time is an object of its own, each second or so, and garbage as soon as the segment itself is there. What a piece has
//! follows from its name: timeline, segment and two offsets. Two owners of a stream may cut it in different places, so pieces
//! may overlap.
//!
//! Left out: when one is put ([`crate::receive`]). Hazard: the end of the pieces is taken for the end of WAL, so they count only
//! where nothing lies behind them.

use super::{Segment, Segments};
use crate::name::{Name, Place};

/// A part of a segment, by offsets in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Piece {
    pub segment: Segment,
    pub from: u32,
    /// The first one that is not in it.
    pub to: u32,
}

impl Piece {
    pub(super) fn name(self, place: Place, segments: Segments) -> Name {
        place.piece(self.segment.timeline, &segments.file_name(self.segment), self.from, self.to)
    }

    /// `None` if the name is not one that [`Piece::name`] makes.
    pub(crate) fn parse(name: &Name, place: Place, segments: Segments) -> Option<Piece> {
        let mut parts = name.last().split('-');
        let segment = segments.parse(parts.next()?)?;
        let mut offset = || u32::from_str_radix(parts.next()?, 16).ok();
        let piece = Piece { segment, from: offset()?, to: offset()? };
        let fits = piece.from < piece.to && piece.to <= segments.bytes();
        (fits && piece.name(place, segments) == *name).then_some(piece)
    }
}

/// Those of one segment's pieces that lead from its beginning as far as possible without a hole.
pub(super) fn joined(pieces: &[Piece]) -> Vec<Piece> {
    let mut way: Vec<Piece> = Vec::new();
    loop {
        let reached = way.last().map_or(0, |last| last.to);
        let further = pieces.iter().filter(|piece| piece.from <= reached && piece.to > reached);
        match further.max_by_key(|piece| piece.to) {
            Some(piece) => way.push(*piece),
            None => return way,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{PLACE, segment, segments};

    fn piece(from: u32, to: u32) -> Piece {
        Piece { segment: segment(1, 3), from, to }
    }

    #[test]
    fn a_name_says_where_a_piece_belongs() {
        let name = piece(0x2000, 0x2FFF).name(PLACE, segments());
        assert!(
            name.as_str().ends_with("/piece/00000001/000000010000000000000003-00002000-00002FFF"),
            "{name}"
        );
        assert_eq!(Piece::parse(&name, PLACE, segments()), Some(piece(0x2000, 0x2FFF)));
        for wrong in [piece(5, 5), piece(6, 5), piece(0, segments().bytes() + 1)] {
            assert_eq!(Piece::parse(&wrong.name(PLACE, segments()), PLACE, segments()), None, "{wrong:?}");
        }
        let partial =
            PLACE.partial(segment(1, 3).timeline, "000000010000000000000003", &crate::hash::Hash([0; 32]));
        assert_eq!(Piece::parse(&partial, PLACE, segments()), None);
    }

    #[test]
    fn pieces_are_joined_up_to_the_first_hole() {
        let pieces = [piece(0, 10), piece(0, 30), piece(10, 20), piece(20, 25), piece(25, 40), piece(41, 50)];
        assert_eq!(joined(&pieces), [piece(0, 30), piece(25, 40)]);
        assert_eq!(joined(&pieces[2..]), [], "without the beginning there is nothing");
    }
}
