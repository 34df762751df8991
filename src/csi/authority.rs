//! Lets the kubelet in: its plugin watcher (grpc-go, dialling a path) sends that path, percent-encoded, as `:authority`,
//! as in `%2Fvar%2Flib%2F…`. No host has such a name, so `h2` answers PROTOCOL_ERROR before any service is asked.
//!
//! Nothing here cares for the authority of a request on a unix socket. So its value is overwritten on the way in, with as many
//! bytes, before HTTP/2 is spoken. HPACK stays in step: the entry that our side keeps in its table is never larger than
//! the client's (a value coded by Huffman is at least as long decoded), so what the client refers to is never evicted.

use std::io::Result;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tonic::transport::server::Connected;

/// `PRI * HTTP/2.0` and so on (RFC 9113, 3.4).
const PREFACE: usize = 24;
/// Length, type, flags, stream (RFC 9113, 4.1).
const FRAME_HEADER: usize = 9;
/// The largest frame, as long as neither side says otherwise; a larger one is passed on, to be refused.
const MAX_FRAME: usize = 16_384;
const HEADERS: u8 = 1;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// Of `:authority` in HPACK's static table.
const AUTHORITY: usize = 1;
/// The name spelled out, as other clients send it, and the same in Huffman's code (RFC 7541, appendix B).
const NAME: &[u8] = b":authority";
const CODED_NAME: &[u8] = &[0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f];

/// A connection whose requests all have an authority that is a host name.
#[derive(Debug)]
pub(super) struct Tolerant {
    inner: UnixStream,
    filter: Filter,
    /// Filtered, from `read` on not yet read.
    filtered: Vec<u8>,
    read: usize,
}

impl Tolerant {
    pub(super) fn new(inner: UnixStream) -> Self {
        Self { inner, filter: Filter::default(), filtered: Vec::new(), read: 0 }
    }
}

impl Connected for Tolerant {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Tolerant {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        let this = &mut *self;
        loop {
            let left = this.filtered.get(this.read..).unwrap_or_default();
            if !left.is_empty() {
                let (now, _) = left.split_at(left.len().min(buf.remaining()));
                buf.put_slice(now);
                this.read += now.len();
                return Poll::Ready(Ok(()));
            }
            this.filtered.clear();
            this.read = 0;
            let mut chunk = [0; 4096];
            let mut chunk = ReadBuf::new(&mut chunk);
            ready!(Pin::new(&mut this.inner).poll_read(cx, &mut chunk))?;
            match chunk.filled() {
                // A frame that was cut off is nobody's request.
                [] => return Poll::Ready(Ok(())),
                bytes => this.filter.push(bytes, &mut this.filtered),
            }
        }
    }
}

impl AsyncWrite for Tolerant {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// The bytes of one client, frame by frame. Holds at most one HEADERS frame.
#[derive(Debug)]
struct Filter {
    /// Bytes to be passed on unseen.
    pass: usize,
    /// The frame that is being collected: its header, or all of a HEADERS frame.
    frame: Vec<u8>,
    /// How long that shall become.
    want: usize,
}

impl Default for Filter {
    fn default() -> Self {
        Self { pass: PREFACE, frame: Vec::new(), want: FRAME_HEADER }
    }
}

impl Filter {
    fn push(&mut self, mut bytes: &[u8], out: &mut Vec<u8>) {
        while !bytes.is_empty() {
            if self.pass > 0 {
                let (now, later) = bytes.split_at(self.pass.min(bytes.len()));
                out.extend_from_slice(now);
                self.pass -= now.len();
                bytes = later;
                continue;
            }
            let (now, later) = bytes.split_at(self.want.saturating_sub(self.frame.len()).min(bytes.len()));
            self.frame.extend_from_slice(now);
            bytes = later;
            if self.frame.len() < self.want {
                return;
            }
            let &[a, b, c, kind, flags, ..] = self.frame.as_slice() else { return };
            let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
            if kind == HEADERS && length <= MAX_FRAME {
                self.want = FRAME_HEADER + length;
                if self.frame.len() < self.want {
                    continue;
                }
                let block = block_start(flags);
                overwrite(self.frame.get_mut(block..).unwrap_or_default());
            } else {
                self.pass = length;
            }
            out.append(&mut self.frame);
            self.want = FRAME_HEADER;
        }
    }
}

/// Where a HEADERS frame's field block starts.
fn block_start(flags: u8) -> usize {
    FRAME_HEADER + usize::from(flags & PADDED != 0) + if flags & PRIORITY != 0 { 5 } else { 0 }
}

/// Makes the value of each literal `:authority` of a field block (RFC 7541, 6) so many letters. What can't be parsed is left as it is.
fn overwrite(block: &mut [u8]) {
    let mut at = 0;
    while let Some(&first) = block.get(at) {
        // Where the index of the name stands, and whether a value follows.
        let (prefix, literal) = match first {
            0x80.. => (7, false),
            0x40.. => (6, true),
            0x20.. => (5, false),
            _ => (4, true),
        };
        let Some((index, next)) = integer(block, at, prefix) else { return };
        at = next;
        if !literal {
            continue;
        }
        let mut is_authority = index == AUTHORITY;
        if index == 0 {
            let coded = block.get(at).is_some_and(|byte| byte & 0x80 != 0);
            let Some((length, start)) = integer(block, at, 7) else { return };
            at = start.saturating_add(length);
            is_authority = block.get(start..at) == Some(if coded { CODED_NAME } else { NAME });
        }
        let value = at;
        let Some((length, start)) = integer(block, at, 7) else { return };
        at = start.saturating_add(length);
        if is_authority && let Some(bytes) = block.get_mut(start..at) {
            bytes.fill(b'x');
            // No longer in Huffman's code.
            if let Some(byte) = block.get_mut(value) {
                *byte &= 0x7f;
            }
        }
    }
}

/// An integer with a prefix of so many bits (RFC 7541, 5.1), and where what follows it starts.
fn integer(block: &[u8], at: usize, prefix: u32) -> Option<(usize, usize)> {
    let mask = (1_usize << prefix) - 1;
    let mut value = usize::from(*block.get(at)?) & mask;
    let mut next = at + 1;
    if value < mask {
        return Some((value, next));
    }
    // Frames are smaller than 2^21: longer integers mean nothing here.
    for shift in [0, 7, 14] {
        let byte = usize::from(*block.get(next)?);
        next += 1;
        value += (byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some((value, next));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio_util::sync::CancellationToken;

    use super::super::server::{self, Services};
    use super::*;

    const RST_STREAM: u8 = 3;

    fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
        let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
        [&[0, length[0], length[1], kind, flags, 0, 0, 0, stream], payload].concat()
    }

    /// A field without Huffman's code: name by static index, or spelled out.
    fn field(index: u8, name: &str, value: &str) -> Vec<u8> {
        let string = |text: &str| [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
        let name = if index == 0 { string(name) } else { Vec::new() };
        [vec![0x40 | index], name, string(value)].concat()
    }

    /// Two calls on one connection, as grpc-go makes them: the second refers to the first one's fields by index.
    fn calls(authority: &[u8]) -> Vec<u8> {
        calls_named(&[0x41], authority)
    }

    fn calls_named(name: &[u8], authority: &[u8]) -> Vec<u8> {
        let block = [
            vec![0x83, 0x86], // POST, http
            field(4, "", "/a.Service/Method"),
            [name, authority].concat(),
            field(31, "", "application/grpc"),
            field(0, "te", "trailers"),
        ];
        // Dynamic table, newest first: te 62, content-type 63, authority 64, path 65.
        let again = [0x83, 0x86, 0x80 | 65, 0x80 | 64, 0x80 | 63, 0x80 | 62];
        [
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
            frame(4, 0, 0, &[]),
            frame(HEADERS, 0x4, 1, &block.concat()),
            frame(0, 0x1, 1, &[0; 5]),
            frame(HEADERS, 0x4, 3, &again),
            frame(0, 0x1, 3, &[0; 5]),
        ]
        .concat()
    }

    /// A value that says it is in Huffman's code.
    const HUFFMAN: [u8; 11] = [0x80 | 10, 0x54, 0x5c, 0x3e, 0xec, 0x3b, 0x05, 0x45, 0xc3, 0xa0, 0xd1];
    const PLAIN: &[u8] = b"\x0d%2Fvar%2Flib%";

    fn filtered(input: &[u8], step: usize) -> Vec<u8> {
        let (mut filter, mut out) = (Filter::default(), Vec::new());
        input.chunks(step).for_each(|chunk| filter.push(chunk, &mut out));
        out
    }

    #[test]
    fn only_the_authority_is_changed_however_the_bytes_arrive() {
        let input = calls(PLAIN);
        let expected = calls(b"\x0dxxxxxxxxxxxxx");
        for step in [1, 2, 7, 64, input.len()] {
            assert_eq!(filtered(&input, step), expected, "in steps of {step}");
        }
        assert_eq!(filtered(&calls(&HUFFMAN), 5), calls(b"\x0axxxxxxxxxx"));
    }

    #[test]
    fn padding_and_priority_are_stepped_over_and_what_is_no_field_is_passed_on() {
        let block = [&[0x41], PLAIN].concat();
        let input =
            [vec![0; PREFACE], frame(HEADERS, 0x2c, 1, &[&[2, 0, 0, 0, 0, 9], &block[..], &[0, 0]].concat())].concat();
        let output = filtered(&input, 3);
        assert_eq!(output.len(), input.len());
        assert!(output.windows(13).any(|window| window == [b'x'; 13]));
        for broken in [&[0x41][..], &[0x41, 0x7f, 0xff, 0xff, 0xff, 0xff], &[0xff; 40], &[0x41, 30, b'%'], &[0]] {
            let input = [vec![0; PREFACE], frame(HEADERS, 0x4, 1, broken)].concat();
            assert_eq!(filtered(&input, 4), input);
        }
    }

    async fn answers_to(bytes: &[u8]) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        let stop = CancellationToken::new();
        let listener = server::bind(&path).await.unwrap();
        let serving = tokio::spawn(server::serve(listener, Services::default(), stop.clone()));
        let mut client = UnixStream::connect(&path).await.unwrap();
        client.write_all(bytes).await.unwrap();
        let mut kinds = Vec::new();
        while kinds.iter().filter(|kind| [HEADERS, RST_STREAM].contains(kind)).count() < 2 {
            let mut header = [0; FRAME_HEADER];
            let read = tokio::time::timeout(Duration::from_secs(60), client.read_exact(&mut header));
            read.await.unwrap().unwrap();
            let mut payload = vec![0; usize::from(header[1]) << 8 | usize::from(header[2])];
            client.read_exact(&mut payload).await.unwrap();
            kinds.push(header[3]);
        }
        drop(client);
        stop.cancel();
        serving.await.unwrap().unwrap();
        kinds
    }

    #[tokio::test]
    async fn a_path_as_authority_is_served_in_every_call_of_a_connection_however_it_is_named() {
        let spelled_out = [&[0x40, NAME.len() as u8], NAME].concat();
        let coded = [&[0x40, 0x80 | CODED_NAME.len() as u8], CODED_NAME].concat();
        for name in [&[0x41][..], &spelled_out, &coded] {
            for authority in [PLAIN, &HUFFMAN] {
                let kinds = answers_to(&calls_named(name, authority)).await;
                assert!(!kinds.contains(&RST_STREAM), "{kinds:?}");
            }
        }
    }
}
