package nats_test

import (
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/nats"
)

func TestTheMarkerEndsTheLog(t *testing.T) {
	url := sharedServer(t)
	b, other := backend(t, url), backend(t, url)
	s := subscribe(t, b, "c")
	first := publish(t, b, "c", "x")
	publish(t, other, "c", "y")
	id := dchannel.NewID()
	marker, err := b.MarkClosed(within(t), "c", id, time.Hour)
	require.NoError(t, err)
	require.Equal(t, dchannel.Position{Epoch: first.Epoch, Seq: 3}, marker)
	for _, b := range []*nats.Backend{b, other} {
		_, err := b.Publish(within(t), "c", frame("late"))
		require.ErrorIs(t, err, dchannel.ErrChanClosed)
		again, err := b.MarkClosed(within(t), "c", dchannel.NewID(), time.Second)
		require.NoError(t, err)
		require.Equal(t, marker, again)
		h := head(t, b, "c")
		require.True(t, h.Closed)
		require.Equal(t, id, h.ID)
		require.Equal(t, time.Hour, h.Keep)
	}
	page := readAll(t, other, "c", dchannel.Position{})
	require.Len(t, page.Entries, 3)
	requireLog(t, page.Entries)
	require.True(t, page.Entries[2].Closed)
	require.Nil(t, page.Entries[2].Data)
	require.Equal(t, page.Entries, s.awaitEntries(t, 3))

	alone, err := b.MarkClosed(within(t), "never published", id, time.Hour)
	require.NoError(t, err)
	require.EqualValues(t, 1, alone.Seq)
}

func TestTheMarkerHasItsTime(t *testing.T) {
	url := sharedServer(t)
	b, other := backend(t, url), backend(t, url)
	first := publish(t, b, "c", "x")
	marked := time.Now()
	_, err := b.MarkClosed(within(t), "c", dchannel.NewID(), 10*time.Millisecond) // a second, rounded up
	require.NoError(t, err)
	require.True(t, head(t, other, "c").Closed)
	require.Eventually(t, func() bool { return !head(t, other, "c").Closed }, patience, 10*time.Millisecond)
	require.Greater(t, time.Since(marked), 900*time.Millisecond)
	for _, b := range []*nats.Backend{b, other} {
		page := readAll(t, b, "c", dchannel.Position{})
		require.Empty(t, page.Entries, "the log goes with its marker")
		require.Zero(t, page.Head.Position)
	}
	next := publish(t, other, "c", "new")
	require.Greater(t, next.Epoch, first.Epoch)
	require.EqualValues(t, 1, next.Seq)
	for _, b := range []*nats.Backend{b, other} {
		page := readAll(t, b, "c", first)
		require.Len(t, page.Entries, 1)
		require.Equal(t, next, page.Entries[0].Position)
		require.Zero(t, page.Entries[0].Prev)
	}
	require.Eventually(t, func() bool { return stored(t, url, t.Name()+".log.c") == 1 }, patience, 10*time.Millisecond,
		"what the old log left is deleted")
}

// stored returns how many messages a subject holds.
func stored(t testing.TB, url, subject string) int {
	t.Helper()
	js, err := jetstream.New(connect(t, url))
	require.NoError(t, err)
	s, err := js.Stream(within(t), strings.SplitN(subject, ".", 2)[0])
	require.NoError(t, err)
	info, err := s.Info(within(t), jetstream.WithSubjectFilter(subject))
	require.NoError(t, err)
	return int(info.State.Subjects[subject])
}

func TestRemove(t *testing.T) {
	url := sharedServer(t)
	b, other := backend(t, url), backend(t, url)
	s := subscribe(t, other, "c")
	first := publish(t, b, "c", "x")
	s.awaitEntries(t, 1)
	publish(t, b, "kept", "x")
	was := head(t, other, "c")
	require.Equal(t, first, was.Position)
	require.NoError(t, b.Remove(within(t), "c"))
	for _, b := range []*nats.Backend{b, other} {
		h := head(t, b, "c")
		require.Zero(t, h.Position)
		require.Equal(t, was.Incarnation, h.Incarnation)
		require.EqualValues(t, 1, head(t, b, "kept").Seq)
		require.Empty(t, readAll(t, b, "c", first).Entries)
	}
	require.NoError(t, b.Remove(within(t), "c"))
	require.NoError(t, b.Remove(within(t), "never there"))
	next := publish(t, other, "c", "y")
	require.Greater(t, next.Epoch, first.Epoch)
	require.EqualValues(t, 1, next.Seq)

	_, err := b.MarkClosed(within(t), "c", dchannel.NewID(), time.Hour)
	require.NoError(t, err)
	_, err = other.Publish(within(t), "c", frame(""))
	require.ErrorIs(t, err, dchannel.ErrChanClosed)
	require.NoError(t, b.Remove(within(t), "c"))
	publish(t, other, "c", "open again, though this one has seen the marker")
}

func TestOldEntriesAreDeletedWhilePublishing(t *testing.T) {
	url := sharedServer(t)
	b := backend(t, url, nats.WithRetention(10000, time.Second))
	began := time.Now()
	n := 0
	for ; time.Since(began) < 5*time.Second; n++ {
		publish(t, b, "c", "x")
	}
	require.Less(t, stored(t, url, t.Name()+".log.c"), n*3/4)
	page := readAll(t, b, "c", dchannel.Position{})
	requireLog(t, page.Entries)
	require.EqualValues(t, n, page.Head.Seq)
	old := time.Now().Add(-time.Second).UnixMilli()
	require.LessOrEqual(t, page.Entries[0].Time, old+100, "what is not old stays")
}

func TestIdleChannelsGo(t *testing.T) {
	url := sharedServer(t)
	opts := []nats.Option{nats.WithRetention(10, time.Second), nats.WithIdleExpiry(time.Second)}
	b, other := backend(t, url, opts...), backend(t, url, opts...)
	subscribe(t, other, "c")
	first := publish(t, b, "c", "x")
	was := head(t, other, "c")
	require.Equal(t, 2*time.Second, was.Keep)
	require.Eventually(t, func() bool { return head(t, other, "c").Seq == 0 }, patience, 10*time.Millisecond)
	require.Equal(t, was.Incarnation, head(t, other, "c").Incarnation)
	require.Eventually(t, func() bool { return stored(t, url, t.Name()+".log.c") == 0 }, patience, 50*time.Millisecond)
	next := publish(t, b, "c", "x")
	require.Greater(t, next.Epoch, first.Epoch)
	require.EqualValues(t, 1, next.Seq)
}

func TestTheStreamIsReadableByPeople(t *testing.T) {
	url := sharedServer(t)
	b := backend(t, url)
	publish(t, b, "a.b", "hello")
	conn := connect(t, url)
	js, err := jetstream.New(conn)
	require.NoError(t, err)
	s, err := js.Stream(within(t), t.Name())
	require.NoError(t, err)
	m, err := s.GetLastMsgForSubject(within(t), t.Name()+".log.a%2Eb")
	require.NoError(t, err)
	require.Regexp(t, `^D1 \d+ 1 1 [0-9a-f]{32} 0{32} \d+ m\nhello$`, string(m.Data))
}

// A handle may be opened while the last one of its channel is being detached.
func TestSubscribeBesideOneThatIsClosed(t *testing.T) {
	b := backend(t, sharedServer(t))
	old := newSink()
	sub, err := b.Subscribe(within(t), "c", old)
	require.NoError(t, err)
	s := subscribe(t, b, "c")
	publish(t, b, "c", "x")
	s.awaitEntries(t, 1)
	sub.Close()
	had := len(old.entries)
	last := publish(t, b, "c", "y")
	s.await(t, "push", func(s *sink) bool { return s.entries[len(s.entries)-1].Position == last })
	require.Len(t, old.entries, had)
}
