package dchannel_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/memory"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// soon is a context that ends before the test does.
func soon(t *testing.T) context.Context {
	ctx, done := context.WithTimeout(t.Context(), 10*time.Second)
	t.Cleanup(done)
	return ctx
}

func open(t *testing.T, b dchannel.Backend, opts ...dchannel.Option) *dchannel.Channel {
	ch, err := dchannel.Open(soon(t), "x", b, opts...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = ch.Detach() })
	return ch
}

func backend(t *testing.T, opts ...memory.Option) *memory.Backend {
	b := memory.New(opts...)
	t.Cleanup(func() { assert.NoError(t, b.Close()) })
	return b
}

// receive expects the messages from, from+1, … below to.
func receive(t *testing.T, ch *dchannel.Channel, from, to int) {
	t.Helper()
	ctx := soon(t)
	for i := from; i < to; i++ {
		v, err := ch.Listen(ctx)
		require.NoError(t, err, "at %d", i)
		require.Equal(t, fmt.Sprint(i), v)
	}
}

func publish(t *testing.T, ch *dchannel.Channel, from, to int) {
	t.Helper()
	ctx := soon(t)
	for i := from; i < to; i++ {
		require.NoError(t, ch.Publish(ctx, fmt.Sprint(i)))
	}
}

func TestEveryHandleGetsEverythingThenTheClose(t *testing.T) {
	b := backend(t)
	var wg sync.WaitGroup
	for range 3 {
		ch := open(t, b)
		wg.Go(func() {
			receive(t, ch, 0, 1000)
			_, err := ch.Listen(soon(t))
			assert.ErrorIs(t, err, dchannel.ErrChanClosed)
			assert.True(t, ch.IsClosed())
		})
	}
	p := dchannel.New("x", b)
	ctx := soon(t)
	for i := range 1000 {
		if i%3 == 0 {
			require.NoError(t, p.Publish(ctx, fmt.Sprint(i)))
		} else {
			require.NoError(t, p.PublishAsync(ctx, fmt.Sprint(i)))
		}
	}
	require.NoError(t, p.Close())
	require.NoError(t, p.Flush(ctx))
	wg.Wait()
	require.NoError(t, p.Close())
	require.ErrorIs(t, p.Publish(ctx, "late"), dchannel.ErrChanClosed)
	_, err := p.Listen(ctx)
	require.ErrorIs(t, err, dchannel.ErrChanClosed)

	late := open(t, b)
	require.True(t, late.IsClosed())
	_, err = late.Listen(ctx)
	require.ErrorIs(t, err, dchannel.ErrChanClosed)

	reader := open(t, b, dchannel.WithStart(dchannel.FromOldest()))
	receive(t, reader, 0, 1000)
	_, err = reader.Listen(ctx)
	require.ErrorIs(t, err, dchannel.ErrChanClosed)
}

func TestGoroutinesOfOneHandleShareItsMessages(t *testing.T) {
	b := backend(t)
	ch := open(t, b)
	var mu sync.Mutex
	seen := map[any]int{}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for {
				v, err := ch.Listen(soon(t))
				if errors.Is(err, dchannel.ErrChanClosed) {
					return
				}
				mu.Lock()
				seen[v]++
				mu.Unlock()
			}
		})
	}
	publish(t, dchannel.New("x", b), 0, 500)
	require.NoError(t, dchannel.New("x", b).Close())
	wg.Wait()
	require.Len(t, seen, 500)
	for v, n := range seen {
		require.Equal(t, 1, n, v)
	}
}

func TestListenReturnsTheContextsOwnError(t *testing.T) {
	ch := open(t, backend(t))
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	_, err := ch.Listen(ctx)
	require.True(t, err == context.DeadlineExceeded) //nolint:errorlint,testifylint // the original's promise
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = ch.Listen(cancelled)
	require.True(t, err == context.Canceled) //nolint:errorlint,testifylint // the original's promise
}

func TestDetachLeavesTheChannelOpen(t *testing.T) {
	b := backend(t)
	leaving, staying := open(t, b), open(t, b)
	got := make(chan error, 2)
	for range 2 {
		go func() {
			_, err := leaving.Listen(t.Context())
			got <- err
		}()
	}
	require.Equal(t, 2, staying.Status().Handles)
	require.NoError(t, leaving.Detach())
	require.NoError(t, leaving.Detach())
	require.ErrorIs(t, <-got, dchannel.ErrDetached)
	require.ErrorIs(t, <-got, dchannel.ErrDetached)
	<-leaving.Done()
	require.False(t, leaving.IsClosed())
	require.ErrorIs(t, leaving.Publish(t.Context(), "x"), dchannel.ErrDetached)
	require.Equal(t, dchannel.State(0), leaving.Status().State)
	publish(t, dchannel.New("x", b), 0, 1)
	receive(t, staying, 0, 1)
}

func TestDoneTellsOfTheClose(t *testing.T) {
	b := backend(t)
	ch := dchannel.New("x", b)
	done := ch.Done()
	require.Eventually(t, func() bool { return ch.Status().Attached }, 5*time.Second, time.Millisecond)
	require.NoError(t, dchannel.New("x", b).Close())
	<-done
	require.True(t, ch.IsClosed())
	require.NoError(t, ch.Detach())
	require.True(t, ch.IsClosed())
}

func TestStartPositions(t *testing.T) {
	b := backend(t)
	first := open(t, b)
	p := dchannel.New("x", b)
	publish(t, p, 0, 10)
	ctx := soon(t)
	var fourth dchannel.Message
	for range 4 {
		var err error
		fourth, err = first.Next(ctx)
		require.NoError(t, err)
	}
	now := open(t, b)
	resumed := open(t, b, dchannel.WithStart(dchannel.After(fourth.Position)))
	oldest := open(t, b, dchannel.WithStart(dchannel.FromOldest()))
	zero := open(t, b, dchannel.WithStart(dchannel.After(dchannel.Position{})))
	publish(t, p, 10, 12)
	receive(t, now, 10, 12)
	receive(t, resumed, 4, 12)
	receive(t, oldest, 0, 12)
	receive(t, zero, 0, 12)

	stale := open(t, b, dchannel.WithStart(dchannel.After(dchannel.Position{Epoch: 1, Seq: 5})))
	var lost *dchannel.LostError
	_, err := stale.Listen(ctx)
	require.ErrorAs(t, err, &lost)
	require.Zero(t, lost.Count)
	receive(t, stale, 0, 12)
}

func TestASlowHandleCatchesUpAndCountsWhatIsGone(t *testing.T) {
	b := backend(t, memory.WithRetention(100, time.Minute))
	slow := open(t, b, dchannel.WithBuffer(1))
	quick := open(t, b, dchannel.WithBuffer(1))
	p := dchannel.New("x", b)
	for i := range 1000 {
		publish(t, p, i, i+1)
		receive(t, quick, i, i+1)
	}
	require.EqualValues(t, 1000, slow.Status().Lag)
	_, err := slow.Listen(soon(t))
	var lost *dchannel.LostError
	require.ErrorAs(t, err, &lost)
	require.ErrorIs(t, err, dchannel.ErrLost)
	require.Contains(t, err.Error(), fmt.Sprintf(`%d messages lost on "x"`, lost.Count))
	receive(t, slow, int(lost.Count), 1000)
	require.Equal(t, lost.Count, slow.Status().Lost)
	require.LessOrEqual(t, lost.Count, uint64(900))
	publish(t, p, 1000, 1001)
	receive(t, slow, 1000, 1001)
	require.Zero(t, slow.Status().Lag)
	require.False(t, slow.Status().CatchingUp)
}

type point struct{ X, Y int }

func TestValues(t *testing.T) {
	b := backend(t)
	ch := open(t, b)
	typed := dchannel.Of[point](open(t, b))
	ctx := soon(t)
	for _, v := range []any{"", "a\x00\xff", []byte{}, []byte{0, 255}} {
		require.NoError(t, ch.Publish(ctx, v))
		got, err := ch.Listen(ctx)
		require.NoError(t, err)
		require.Equal(t, v, got)
		_, err = typed.Listen(ctx)
		require.ErrorIs(t, err, dchannel.ErrCodec)
	}
	require.NoError(t, typed.Publish(ctx, point{1, 2}))
	got, err := ch.Listen(ctx)
	require.NoError(t, err)
	require.Equal(t, map[string]any{"X": 1.0, "Y": 2.0}, got)
	p, err := typed.Listen(ctx)
	require.NoError(t, err)
	require.Equal(t, point{1, 2}, p)

	require.NoError(t, ch.Publish(ctx, nil))
	got, err = ch.Listen(ctx)
	require.NoError(t, err)
	require.Nil(t, got)
}

type odd struct{ dchannel.Codec }

func (odd) Name() string { return "odd" }

func (odd) Marshal(v any) ([]byte, error) {
	if v == 13 {
		panic("thirteen")
	}
	return nil, fmt.Errorf("no %T", v)
}

func TestBadInputIsToldAtOnce(t *testing.T) {
	b := backend(t)
	ctx := soon(t)
	var none *memory.Backend
	for _, c := range []struct {
		name string
		b    dchannel.Backend
		opts []dchannel.Option
		want error
		text string
	}{
		{"", b, nil, dchannel.ErrInvalidName, "empty"},
		{strings.Repeat("n", 256), b, nil, dchannel.ErrInvalidName, "256 bytes, the limit is 255"},
		{"a\xff", b, nil, dchannel.ErrInvalidName, "not UTF-8"},
		{"a\nb", b, nil, dchannel.ErrInvalidName, "U+000A at byte 1"},
		{"x", nil, nil, dchannel.ErrInvalidOption, "nil"},
		{"x", none, nil, dchannel.ErrInvalidOption, "nil *memory.Backend"},
		{"x", incomparable{}, nil, dchannel.ErrInvalidOption, "not comparable"},
		{"x", b, []dchannel.Option{nil}, dchannel.ErrInvalidOption, "nil"},
		{"x", b, []dchannel.Option{dchannel.WithTimeout(-1)}, dchannel.ErrInvalidOption, "WithTimeout(-1ns)"},
		{"x", b, []dchannel.Option{dchannel.WithMaxMessage(0)}, dchannel.ErrInvalidOption, "WithMaxMessage(0)"},
		{"x", b, []dchannel.Option{dchannel.WithBuffer(-5)}, dchannel.ErrInvalidOption, "WithBuffer(-5)"},
		{"x", b, []dchannel.Option{dchannel.WithQueue(0)}, dchannel.ErrInvalidOption, "WithQueue(0)"},
		{"x", b, []dchannel.Option{dchannel.WithCloseKeep(1)}, dchannel.ErrInvalidOption, "at least 1s"},
		{"x", b, []dchannel.Option{dchannel.WithCodec(nil)}, dchannel.ErrInvalidOption, "WithCodec"},
		{"x", memory.New(memory.WithRetention(-1, 0)), nil, dchannel.ErrInvalidOption, "-1"},
	} {
		_, err := dchannel.Open(ctx, c.name, c.b, c.opts...)
		require.ErrorIs(t, err, c.want)
		require.ErrorContains(t, err, c.text)
		ch := dchannel.New(c.name, c.b, c.opts...)
		require.ErrorIs(t, ch.Publish(ctx, "m"), c.want)
		_, err = ch.Listen(ctx)
		require.ErrorIs(t, err, c.want)
		require.False(t, ch.IsClosed())
		require.ErrorIs(t, ch.Status().Reason, c.want)
		require.ErrorIs(t, ch.Close(), c.want)
		require.NoError(t, ch.Detach())
	}
	require.ErrorIs(t, dchannel.Remove(ctx, "", b), dchannel.ErrInvalidName)

	ch := open(t, b, dchannel.WithMaxMessage(10), dchannel.WithCodec(odd{}))
	require.ErrorIs(t, ch.Publish(ctx, strings.Repeat("x", 11)), dchannel.ErrTooLarge)
	require.ErrorContains(t, ch.PublishAsync(ctx, strings.Repeat("x", 11)), "11 bytes, the limit is 10")
	require.ErrorIs(t, ch.Publish(ctx, 13), dchannel.ErrCodec)
	require.ErrorIs(t, ch.Publish(ctx, 14), dchannel.ErrCodec)
	require.NoError(t, ch.Publish(ctx, "0")) // and nothing of the above before it
	receive(t, ch, 0, 1)

	require.NoError(t, b.Close())
	require.ErrorIs(t, ch.Publish(ctx, "m"), dchannel.ErrBackendClosed)
	_, err := ch.Listen(ctx)
	require.ErrorIs(t, err, dchannel.ErrBackendClosed)
	_, err = dchannel.Open(ctx, "x", b)
	require.ErrorIs(t, err, dchannel.ErrBackendClosed)
}

type incomparable struct {
	dchannel.Backend
	_ []int
}

func TestOutagesAreRiddenOutOrTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := memory.NewStore()
		b, other := store.Backend(), store.Backend()
		ch, err := dchannel.Open(t.Context(), "x", b)
		require.NoError(t, err)
		cause := errors.New("the cable is out")
		b.Cut(cause)
		synctest.Wait()
		st := ch.Status()
		require.Equal(t, dchannel.StateInterrupted, st.State)
		require.ErrorIs(t, st.Reason, cause)

		// Shorter than WithTimeout: nobody notices.
		time.AfterFunc(2*time.Second, b.Heal)
		publish(t, dchannel.New("x", other), 0, 1)
		require.NoError(t, ch.Publish(t.Context(), "1"))
		receive(t, ch, 0, 2)
		require.Equal(t, dchannel.StateLive, ch.Status().State)
		require.EqualValues(t, 1, ch.Status().Reconnects)

		// Longer: every call says so when its time is over, and that nothing was sent.
		b.Cut(cause)
		start := time.Now()
		err = ch.Publish(t.Context(), "2")
		require.ErrorIs(t, err, dchannel.ErrUnavailable)
		require.NotErrorIs(t, err, dchannel.ErrUncertain)
		require.ErrorIs(t, err, cause)
		require.InDelta(t, dchannel.DefaultTimeout, time.Since(start), float64(time.Second))
		_, err = dchannel.Open(t.Context(), "y", b)
		require.ErrorIs(t, err, dchannel.ErrUnavailable)
		require.ErrorIs(t, err, cause)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		err = ch.Publish(ctx, "2")
		cancel()
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorIs(t, err, dchannel.ErrUnavailable)
		require.NotErrorIs(t, err, dchannel.ErrUncertain)
		b.Heal()
		require.NoError(t, ch.Publish(t.Context(), "2"))
		receive(t, ch, 2, 3)

		// A server that stands still: nobody knows.
		store.Pause()
		ctx, cancel = context.WithTimeout(t.Context(), time.Second)
		err = ch.Publish(ctx, "3")
		cancel()
		require.ErrorIs(t, err, dchannel.ErrUncertain)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		store.Resume()

		require.NoError(t, ch.Detach())
		require.NoError(t, b.Close())
		require.NoError(t, other.Close())
	})
}

func TestALostReplyIsTriedAgainAndNotSentTwice(t *testing.T) {
	b := backend(t)
	ch := open(t, b)
	for i := range 10 {
		b.LoseReplies(i % 3)
		publish(t, ch, i, i+1)
	}
	b.LoseReplies(1)
	require.NoError(t, ch.Close())
	receive(t, ch, 0, 10)
	_, err := ch.Listen(soon(t))
	require.ErrorIs(t, err, dchannel.ErrChanClosed)
}

func TestLostStateIsReported(t *testing.T) {
	store := memory.NewStore()
	b := store.Backend()
	defer b.Close()
	ch := open(t, b)
	store.LoseState() // there was nothing in the channel, but nobody can know
	_, err := ch.Listen(soon(t))
	var first *dchannel.LostError
	require.ErrorAs(t, err, &first)
	require.Zero(t, first.Next)
	publish(t, ch, 0, 2)
	receive(t, ch, 0, 2)
	store.LoseState()
	publish(t, ch, 2, 3)
	var lost *dchannel.LostError
	_, err = ch.Listen(soon(t))
	require.ErrorAs(t, err, &lost)
	require.Zero(t, lost.Count)
	receive(t, ch, 2, 3)
	require.EqualValues(t, 2, ch.Status().LostUnknown)
}

func TestACancelledPublishThatWasNotSentIsTakenBack(t *testing.T) {
	store := memory.NewStore()
	b := store.Backend()
	defer b.Close()
	ch := open(t, b, dchannel.WithTimeout(time.Minute))
	store.Pause()
	var wg sync.WaitGroup
	wg.Go(func() { assert.NoError(t, ch.Publish(t.Context(), "0")) }) // the flight
	require.Eventually(t, func() bool { return store.Calls() > 0 }, 5*time.Second, time.Millisecond)
	ctx, cancel := context.WithCancel(t.Context())
	wg.Go(func() {
		err := ch.Publish(ctx, "never")
		// It may have been the flight, and "0" stood in line; then it may even have got
		// through before anybody looked at the context.
		if err != nil && !errors.Is(err, dchannel.ErrUncertain) {
			assert.ErrorIs(t, err, context.Canceled)
		}
	})
	require.NoError(t, ch.PublishAsync(t.Context(), "1"))
	cancel()
	store.Resume()
	wg.Wait()
	require.NoError(t, ch.Flush(t.Context()))
}

func TestMessagesEndsWithTheClose(t *testing.T) {
	store := memory.NewStore()
	b := store.Backend()
	defer b.Close()
	ch := open(t, b)
	publish(t, ch, 0, 3)
	store.LoseState()
	publish(t, ch, 3, 5)
	require.NoError(t, ch.Close())
	n, gaps := 0, 0
	for m, err := range ch.Messages(soon(t)) {
		if err != nil {
			require.ErrorIs(t, err, dchannel.ErrLost)
			gaps++
			continue
		}
		v, err := m.Value()
		require.NoError(t, err)
		require.Equal(t, fmt.Sprint(n), v)
		n++
	}
	require.Equal(t, 5, n)
	require.Equal(t, 1, gaps)

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, err := range open(t, backend(t)).Messages(ctx) {
		require.ErrorIs(t, err, context.Canceled)
	}
}

func TestPublishAsyncWaitsForRoom(t *testing.T) {
	store := memory.NewStore()
	b := store.Backend()
	defer b.Close()
	ch := open(t, b, dchannel.WithQueue(1000), dchannel.WithTimeout(time.Minute))
	store.Pause()
	var err error
	n := 0
	for ; err == nil; n++ {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		err = ch.PublishAsync(ctx, make([]byte, 100))
		cancel()
	}
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.InDelta(t, 10, n, 2)
	store.Resume()
	require.NoError(t, ch.Flush(soon(t)))
	require.EqualValues(t, n-1, ch.Status().Published)

	require.NoError(t, ch.Close())
	p := open(t, b)
	require.ErrorIs(t, p.PublishAsync(t.Context(), "x"), dchannel.ErrChanClosed)
	require.NoError(t, b.Close())
	q := dchannel.New("z", b)
	require.NoError(t, q.PublishAsync(t.Context(), "x"))
	require.ErrorIs(t, q.Flush(soon(t)), dchannel.ErrBackendClosed)
	require.NoError(t, q.Flush(soon(t)))
}

func TestRemove(t *testing.T) {
	store := memory.NewStore()
	b := store.Backend()
	defer b.Close()
	require.NoError(t, dchannel.New("x", b).Close())
	require.True(t, open(t, b).IsClosed())
	require.NoError(t, dchannel.Remove(t.Context(), "x", b))
	require.Zero(t, store.Channels())
	ch := open(t, b)
	require.False(t, ch.IsClosed())
	publish(t, ch, 0, 1)
	receive(t, ch, 0, 1)
}

func TestQueuedMessagesShareTheTimeOfAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := memory.New()
		ch := dchannel.New("x", b)
		b.Cut(nil)
		start := time.Now()
		var wg sync.WaitGroup
		for range 5 { // each a frame of its own
			wg.Go(func() {
				err := ch.Publish(t.Context(), make([]byte, 100_000))
				assert.ErrorIs(t, err, dchannel.ErrUnavailable)
				assert.NotErrorIs(t, err, dchannel.ErrUncertain)
			})
		}
		wg.Wait()
		require.Less(t, time.Since(start), dchannel.DefaultTimeout+time.Second)
		b.Heal()
		require.NoError(t, ch.Publish(t.Context(), "x"))
		require.NoError(t, ch.Detach())
		require.NoError(t, b.Close())
	})
}
