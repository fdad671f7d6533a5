package nats_test

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/nats"
)

func TestAppendsAreReadAndPushed(t *testing.T) {
	url := sharedServer(t)
	b, other := backend(t, url), backend(t, url)
	s := subscribe(t, other, "c")
	require.Equal(t, dchannel.Position{}, head(t, b, "c").Position)

	f := dchannel.Frame{ID: dchannel.NewID(), Count: 3, Data: []byte("a\x00\xff\r\nb")}
	first, err := b.Publish(within(t), "c", f)
	require.NoError(t, err)
	require.EqualValues(t, 3, first.Seq)
	require.InDelta(t, time.Now().UnixMicro(), first.Epoch, 5e6)
	second := publish(t, other, "c", "")
	require.Equal(t, dchannel.Position{Epoch: first.Epoch, Seq: 4}, second)

	page := readAll(t, b, "c", dchannel.Position{})
	require.Len(t, page.Entries, 2)
	requireLog(t, page.Entries)
	e := page.Entries[0]
	require.Equal(t, first, e.Position)
	require.Equal(t, f.ID, e.ID)
	require.Equal(t, 3, e.Count)
	require.Equal(t, f.Data, e.Data)
	require.Zero(t, e.Prev)
	require.InDelta(t, time.Now().UnixMilli(), e.Time, 5e3)
	require.Empty(t, page.Entries[1].Data)
	require.Equal(t, second, page.Head.Position)
	require.Equal(t, page.Entries[1].ID, page.Head.ID)
	require.Equal(t, page.Head, head(t, other, "c"))
	require.Equal(t, 24*time.Hour+10*time.Minute, page.Head.Keep)
	require.Equal(t, head(t, b, "nothing").Incarnation, page.Head.Incarnation)
	require.NotZero(t, page.Head.Incarnation)

	pushed := s.awaitEntries(t, 2)
	require.Equal(t, page.Entries, pushed)

	for after, want := range []int{2, 2, 2, 1, 0, 0} { // an entry whose last record is above
		page := readAll(t, b, "c", dchannel.Position{Epoch: first.Epoch, Seq: uint64(after)})
		require.Len(t, page.Entries, want, "after %d", after)
		require.Equal(t, second, page.Head.Position)
	}
	require.Len(t, readAll(t, b, "c", dchannel.Position{Epoch: 1, Seq: 99}).Entries, 2, "another epoch")
}

func TestReadStopsAtTheLimitAndGoesOn(t *testing.T) {
	url := sharedServer(t)
	b := backend(t, url)
	const n, size = 2500, 100
	for range n {
		publish(t, b, "c", strings.Repeat("x", size))
	}
	for _, reader := range []*nats.Backend{b, backend(t, url)} {
		for _, limit := range []int{-1, 1, size, 10 * size, 1200 * size} {
			var all []dchannel.Entry
			pages := 0
			for after := (dchannel.Position{}); ; pages++ {
				page, err := reader.Read(within(t), "c", after, limit)
				require.NoError(t, err)
				if len(page.Entries) == 0 {
					break
				}
				require.LessOrEqual(t, len(page.Entries), max(1, limit/size))
				all = append(all, page.Entries...)
				after = all[len(all)-1].Position
				if limit < 10*size && len(all) >= 20 {
					break // a page an entry: enough of it
				}
			}
			requireLog(t, all)
			require.EqualValues(t, 1, all[0].Seq)
			if limit >= 10*size {
				require.Len(t, all, n)
			}
		}
	}
}

func TestRetryIsIdempotent(t *testing.T) {
	url := sharedServer(t)
	b, other := backend(t, url), backend(t, url)
	f := frame("x")
	pos, err := b.Publish(within(t), "c", f)
	require.NoError(t, err)
	for i := range 2000 {
		publish(t, other, "c", fmt.Sprint(i))
	}
	f.Age = time.Minute
	for _, b := range []*nats.Backend{b, other, backend(t, url)} {
		again, err := b.Publish(within(t), "c", f)
		require.NoError(t, err)
		require.Equal(t, pos, again)
	}
	_, err = b.MarkClosed(within(t), "c", dchannel.NewID(), time.Hour)
	require.NoError(t, err)
	again, err := other.Publish(within(t), "c", f)
	require.NoError(t, err, "it is below the marker")
	require.Equal(t, pos, again)
	fresh := frame("never tried")
	fresh.Age = time.Minute
	_, err = other.Publish(within(t), "c", fresh)
	require.ErrorIs(t, err, dchannel.ErrChanClosed)
	got, err := other.Publish(within(t), "empty", fresh)
	require.NoError(t, err)
	require.EqualValues(t, 1, got.Seq)
	require.Len(t, readAll(t, b, "c", dchannel.Position{}).Entries, 2002)
}

func TestRetryBeyondRetentionIsForgotten(t *testing.T) {
	b := backend(t, sharedServer(t), nats.WithRetention(5, time.Minute))
	f := frame("x")
	_, err := b.Publish(within(t), "c", f)
	require.NoError(t, err)
	for range 100 {
		publish(t, b, "c", "more")
	}
	page := readAll(t, b, "c", dchannel.Position{})
	require.Len(t, page.Entries, 6, "five and the marker's place")
	require.EqualValues(t, 96, page.Entries[0].Seq)
	f.Age = 30 * time.Second
	_, err = b.Publish(within(t), "c", f)
	require.ErrorIs(t, err, dchannel.ErrForgotten)
}

func TestAppendsOfManyAreOneLog(t *testing.T) {
	const backends, each = 8, 100
	url := sharedServer(t)
	var wg sync.WaitGroup
	watcher := backend(t, url)
	s := subscribe(t, watcher, "c")
	for i := range backends {
		b := backend(t, url)
		if i%2 == 0 {
			subscribe(t, b, "c")
		}
		wg.Go(func() {
			last := dchannel.Position{}
			for range each {
				pos, err := b.Publish(context.Background(), "c", frame(fmt.Sprint(i)))
				if err != nil || pos.Seq <= last.Seq {
					t.Errorf("after %v: %v, %v", last, pos, err)
					return
				}
				last = pos
			}
		})
	}
	wg.Wait()
	entries := readAll(t, watcher, "c", dchannel.Position{}).Entries
	require.Len(t, entries, backends*each)
	requireLog(t, entries)
	require.Zero(t, entries[0].Prev)
	require.Equal(t, entries, s.awaitEntries(t, backends*each))
}

func TestCloseRacesAppends(t *testing.T) {
	url := sharedServer(t)
	b, other := backend(t, url), backend(t, url)
	for round := range 20 {
		name := fmt.Sprint("c", round)
		accepted := make(chan dchannel.Position, 1000)
		var wg sync.WaitGroup
		for _, b := range []*nats.Backend{b, other} {
			wg.Go(func() {
				for {
					pos, err := b.Publish(context.Background(), name, frame("x"))
					if err != nil {
						if !errorIs(err, dchannel.ErrChanClosed) {
							t.Error(err)
						}
						return
					}
					accepted <- pos
				}
			})
		}
		<-accepted
		marker, err := b.MarkClosed(within(t), name, dchannel.NewID(), time.Hour)
		require.NoError(t, err)
		wg.Wait()
		close(accepted)
		n := uint64(1)
		for pos := range accepted {
			require.Less(t, pos.Seq, marker.Seq)
			n++
		}
		require.Equal(t, marker.Seq, n+1)
	}
}

var weird = []string{"a", "a.b", "a b", "*", ">", "a.*", "a.>", "{x}", "%2E", "a%2Eb", "日本語", "$JS", "_", "-", ".", "..",
	"/", `\`, `"`, "a\u00a0b", strings.Repeat("ü", 127) + "x", strings.Repeat("x", 255), strings.Repeat(".", 255), strings.Repeat("é", 127)}

func TestNamesStayApart(t *testing.T) {
	url := sharedServer(t)
	b := backend(t, url)
	sinks := make([]*sink, len(weird))
	for i, name := range weird {
		sinks[i] = subscribe(t, b, name)
	}
	for i, name := range weird {
		publish(t, b, name, fmt.Sprint(i))
	}
	heads, err := b.Heads(within(t), weird)
	require.NoError(t, err)
	for i, name := range weird {
		require.EqualValues(t, 1, heads[i].Seq, "%q", name)
		page := readAll(t, b, name, dchannel.Position{})
		require.Len(t, page.Entries, 1)
		require.Equal(t, fmt.Sprint(i), string(page.Entries[0].Data))
		publish(t, b, name, "last")
		pushed := sinks[i].awaitEntries(t, 2)
		require.Len(t, pushed, 2)
		require.Equal(t, fmt.Sprint(i), string(pushed[0].Data))
	}
}

func TestTheLargestFrame(t *testing.T) {
	url := sharedServer(t)
	b := backend(t, url)
	s := subscribe(t, b, strings.Repeat("é", 127))
	require.Equal(t, 1<<20-512, b.MaxFrame())
	f := dchannel.Frame{ID: dchannel.NewID(), Count: 1, Data: bytes.Repeat([]byte{0xff}, b.MaxFrame())}
	for range 3 {
		f.ID = dchannel.NewID()
		_, err := b.Publish(within(t), strings.Repeat("é", 127), f)
		require.NoError(t, err)
	}
	require.Equal(t, f.Data, s.awaitEntries(t, 3)[2].Data)
	require.Equal(t, f.Data, readAll(t, b, strings.Repeat("é", 127), dchannel.Position{}).Entries[0].Data)
	f.Data = append(f.Data, 0)
	_, err := b.Publish(within(t), "c", f)
	require.ErrorIs(t, err, dchannel.ErrTooLarge)
}

func TestHeadsOfMany(t *testing.T) {
	url := sharedServer(t)
	b, other := backend(t, url), backend(t, url)
	const n = 2500
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprint("c", i)
	}
	for i := 0; i < n; i += 2 {
		publish(t, b, names[i], strings.Repeat("x", i))
	}
	check := func(want func(i int) uint64) {
		t.Helper()
		for _, b := range []*nats.Backend{b, other} {
			heads, err := b.Heads(within(t), names)
			require.NoError(t, err)
			for i, h := range heads {
				require.Equal(t, want(i), h.Seq, "channel %d", i)
			}
		}
	}
	check(func(i int) uint64 { return uint64(1 - i%2) })
	// Those of subscribed channels are remembered, and only news are asked for.
	for _, b := range []*nats.Backend{b, other} {
		for i := range 100 {
			subscribe(t, b, names[i*20])
		}
	}
	check(func(i int) uint64 { return uint64(1 - i%2) })
	publish(t, other, names[20], "news")
	publish(t, other, names[21], "news")
	news := func(i int) uint64 {
		switch i {
		case 20:
			return 2
		case 21:
			return 1
		}
		return uint64(1 - i%2)
	}
	check(news)
	require.NoError(t, other.Remove(within(t), names[40]))
	check(func(i int) uint64 {
		if i == 40 {
			return 0
		}
		return news(i)
	})
	ping, err := b.Heads(within(t), nil)
	require.NoError(t, err)
	require.Empty(t, ping)
}

func TestForeignMessagesAreStepped(t *testing.T) {
	url := sharedServer(t)
	b := backend(t, url)
	s := subscribe(t, b, "c")
	conn := connect(t, url)
	first := publish(t, b, "c", "x")
	for _, subject := range []string{".log.c", ".log.d", ".push.c"} {
		_, err := conn.Request(t.Name()+subject, []byte("hello"), time.Second)
		if subject != ".push.c" {
			require.NoError(t, err)
		}
	}
	for _, b := range []*nats.Backend{b, backend(t, url)} {
		h := head(t, b, "c")
		require.Equal(t, first.Epoch, h.Epoch)
		require.Zero(t, head(t, b, "d").Position)
		pos := publish(t, b, "c", "y")
		require.Equal(t, dchannel.Position{Epoch: first.Epoch, Seq: h.Seq + 1}, pos)
	}
	page := readAll(t, b, "c", dchannel.Position{})
	require.Len(t, page.Entries, 3)
	requireLog(t, page.Entries)
	require.Equal(t, page.Entries, s.awaitEntries(t, 3))
	require.EqualValues(t, 1, publish(t, b, "d", "x").Seq)
}
