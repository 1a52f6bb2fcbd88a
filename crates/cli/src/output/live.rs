//! A view that is drawn again in its place, on a terminal only.
//!
//! Hazard: a line longer than the terminal wraps, and the next drawing begins too low. So lines are cut.

use std::io::{self, Write};

/// When the terminal does not say how wide it is.
const USUAL_COLUMNS: usize = 80;

#[derive(Debug, Default)]
pub(crate) struct Live {
    drawn: usize,
}

impl Live {
    /// Replaces what was drawn before.
    pub(crate) fn draw(&mut self, lines: &[String]) -> io::Result<()> {
        let (columns, rows) = terminal_size();
        // One row stays free for the cursor.
        let shown = lines.len().min(rows.saturating_sub(1).max(1));
        let mut text = self.erase_sequence();
        for line in &lines[..shown] {
            text.push_str(&cut(line, columns));
            text.push('\n');
        }
        self.drawn = shown;
        write(&text)
    }

    /// Takes the view away, so that ordinary lines can be printed where it was.
    pub(crate) fn clear(&mut self) -> io::Result<()> {
        let text = self.erase_sequence();
        self.drawn = 0;
        write(&text)
    }

    fn erase_sequence(&self) -> String {
        match self.drawn {
            0 => String::new(),
            drawn => format!("\u{1b}[{drawn}A\r\u{1b}[J"),
        }
    }
}

fn write(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Columns and rows of the terminal behind stdout.
fn terminal_size() -> (usize, usize) {
    match rustix::termios::tcgetwinsize(io::stdout()) {
        Ok(size) if size.ws_col > 0 && size.ws_row > 0 => (size.ws_col.into(), size.ws_row.into()),
        _ => (USUAL_COLUMNS, usize::from(u16::MAX)),
    }
}

/// The first `columns` letters, not counting colour sequences, which are kept so that colours end.
fn cut(line: &str, columns: usize) -> String {
    let (mut text, mut width, mut in_sequence) = (String::new(), 0, false);
    for letter in line.chars() {
        if letter == '\u{1b}' {
            in_sequence = true;
        }
        if in_sequence {
            text.push(letter);
            in_sequence = letter != 'm';
        } else if width < columns {
            text.push(letter);
            width += 1;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_line_keeps_its_colours_balanced() {
        assert_eq!(cut("abc", 2), "ab");
        assert_eq!(cut("\u{1b}[1mabc\u{1b}[0m d", 2), "\u{1b}[1mab\u{1b}[0m");
        assert_eq!(cut("äöü", 5), "äöü");
    }

    #[test]
    fn a_second_drawing_begins_where_the_first_did() {
        assert_eq!(Live { drawn: 3 }.erase_sequence(), "\u{1b}[3A\r\u{1b}[J");
        assert_eq!(Live::default().erase_sequence(), "");
    }
}
