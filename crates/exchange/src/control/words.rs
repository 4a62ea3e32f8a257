//! What ranks say: a tag and eight bytes, or an end of a connection.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

pub(super) fn frame(tag: Tag, value: u64) -> [u8; FRAME_LEN] {
    let mut frame = [tag as u8; FRAME_LEN];
    frame[1..].copy_from_slice(&value.to_le_bytes());
    frame
}

pub(super) fn read(stream: &mut UnixStream) -> io::Result<(Tag, u64)> {
    let mut frame = [0; FRAME_LEN];
    stream.read_exact(&mut frame)?;
    let [tag, value @ ..] = frame;
    let tag = TAGS.into_iter().find(|known| *known as u8 == tag).ok_or(io::ErrorKind::InvalidData)?;
    Ok((tag, u64::from_le_bytes(value)))
}

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tag {
    Hello = 1,
    Place,
    Welcome,
    Agree,
    Agreed,
    Disagree,
    Bytes,
    Aborted,
    Done,
}

const TAGS: [Tag; 9] = [
    Tag::Hello,
    Tag::Place,
    Tag::Welcome,
    Tag::Agree,
    Tag::Agreed,
    Tag::Disagree,
    Tag::Bytes,
    Tag::Aborted,
    Tag::Done,
];

pub(super) const FRAME_LEN: usize = 9;

/// Hands one end of a connection to a rank.
pub(super) fn send_stream(to: &UnixStream, end: &UnixStream) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let ends = [end.as_fd()];
    let is_room = control.push(SendAncillaryMessage::ScmRights(&ends));
    assert!(is_room, "the space is for one descriptor");
    rustix::net::sendmsg(to, &[IoSlice::new(&[Tag::Bytes as u8])], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Takes what [`send_stream`] handed over; the rank that is gone, where that is what is told instead.
pub(super) fn receive_stream(from: &mut UnixStream) -> io::Result<Result<UnixStream, u32>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut tag = [0];
    rustix::net::recvmsg(&*from, &mut [IoSliceMut::new(&mut tag)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut received = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut ends) => ends.next(),
        _ => None,
    });
    match received.next() {
        Some(end) => Ok(Ok(end.into())),
        None if tag[0] == Tag::Aborted as u8 => {
            let mut who = [0; FRAME_LEN - 1];
            from.read_exact(&mut who)?;
            Ok(Err(u64::from_le_bytes(who) as u32))
        }
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}
