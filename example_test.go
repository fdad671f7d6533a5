package dchannel_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/memory"
)

// Two processes share a channel: each has a backend of its own on one server.
func Example() {
	ctx := context.Background()
	server := memory.NewStore()
	here, there := server.Backend(), server.Backend()
	defer here.Close()
	defer there.Close()

	listener, err := dchannel.Open(ctx, "orders", there)
	if err != nil {
		fmt.Println(err)
		return
	}
	publisher := dchannel.New("orders", here)
	if err := publisher.Publish(ctx, "three apples"); err != nil {
		fmt.Println(err)
		return
	}
	if err := publisher.Close(); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(listener.Listen(ctx))
	_, err = listener.Listen(ctx)
	fmt.Println(errors.Is(err, dchannel.ErrChanClosed), listener.IsClosed())
	// Output:
	// three apples <nil>
	// true true
}

// Listen has three kinds of answers: a message, the end, and a gap. The rest is the
// context's own error, or says that this handle or its backend was ended.
func ExampleChannel_Listen() {
	ctx := context.Background()
	b := memory.New()
	defer b.Close()
	ch, err := dchannel.Open(ctx, "readings", b)
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, msg := range []any{"a string", []byte("bytes"), map[string]int{"degrees": 21}} {
		if err := ch.Publish(ctx, msg); err != nil {
			fmt.Println(err)
			return
		}
	}
	if err := ch.Close(); err != nil {
		fmt.Println(err)
		return
	}
	for {
		msg, err := ch.Listen(ctx)
		switch {
		case errors.Is(err, dchannel.ErrChanClosed):
			fmt.Println("closed")
			return
		case errors.Is(err, dchannel.ErrLost):
			fmt.Println("missed some:", err)
		case err != nil:
			fmt.Println("over:", err)
			return
		default:
			fmt.Printf("%T %v\n", msg, msg)
		}
	}
	// Output:
	// string a string
	// []uint8 [98 121 116 101 115]
	// map[string]interface {} map[degrees:21]
	// closed
}

// Of gives a channel's messages a type.
func ExampleOf() {
	type order struct {
		ID    int
		Items []string
	}
	ctx := context.Background()
	b := memory.New()
	defer b.Close()
	ch, err := dchannel.Open(ctx, "orders", b)
	if err != nil {
		fmt.Println(err)
		return
	}
	orders := dchannel.Of[order](ch)
	if err := orders.Publish(ctx, order{7, []string{"apple", "pear"}}); err != nil {
		fmt.Println(err)
		return
	}
	o, err := orders.Listen(ctx)
	fmt.Println(o.ID, o.Items[1], err)
	// Output: 7 pear <nil>
}

// Messages ends with the channel. Each message knows its place, and a listener that
// remembers the last one goes on behind it after a restart.
func ExampleChannel_Messages() {
	ctx := context.Background()
	b := memory.New()
	defer b.Close()
	publisher := dchannel.New("steps", b)
	for _, msg := range []string{"one", "two", "three"} {
		if err := publisher.Publish(ctx, msg); err != nil {
			fmt.Println(err)
			return
		}
	}
	if err := publisher.Close(); err != nil {
		fmt.Println(err)
		return
	}

	first := dchannel.New("steps", b, dchannel.WithStart(dchannel.FromOldest()))
	var last dchannel.Position
	for m, err := range first.Messages(ctx) {
		if err != nil {
			fmt.Println(err)
			return
		}
		v, err := m.Value()
		fmt.Println(m.Position.Seq, v, err)
		last = m.Position
		break // the listener stops here
	}
	again := dchannel.New("steps", b, dchannel.WithStart(dchannel.After(last)))
	for m, err := range again.Messages(ctx) {
		if err != nil {
			fmt.Println(err)
			return
		}
		v, err := m.Value()
		fmt.Println(m.Position.Seq, v, err)
	}
	// Output:
	// 1 one <nil>
	// 2 two <nil>
	// 3 three <nil>
}

// A listener that was away for longer than messages are retained is told how many it
// missed, at their place in the order, and goes on behind them.
func ExampleLostError() {
	ctx := context.Background()
	server := memory.NewStore(memory.WithRetention(3, memory.DefaultRetention))
	here, there := server.Backend(), server.Backend()
	defer here.Close()
	defer there.Close()
	listener, err := dchannel.Open(ctx, "ticks", there)
	if err != nil {
		fmt.Println(err)
		return
	}
	publisher := dchannel.New("ticks", here)

	there.Cut(nil)
	for i := range 10 {
		if err := publisher.Publish(ctx, fmt.Sprint("tick ", i)); err != nil {
			fmt.Println(err)
			return
		}
	}
	there.Heal()

	_, err = listener.Listen(ctx)
	var lost *dchannel.LostError
	fmt.Println(errors.As(err, &lost), lost.Count)
	for range 3 {
		fmt.Println(listener.Listen(ctx))
	}
	// Output:
	// true 7
	// tick 7 <nil>
	// tick 8 <nil>
	// tick 9 <nil>
}

// PublishAsync queues, and many messages travel in one round trip. Flush tells what
// became of them.
func ExampleChannel_PublishAsync() {
	ctx := context.Background()
	b := memory.New()
	defer b.Close()
	ch, err := dchannel.Open(ctx, "log", b)
	if err != nil {
		fmt.Println(err)
		return
	}
	for i := range 1000 {
		if err := ch.PublishAsync(ctx, fmt.Sprint("line ", i)); err != nil {
			fmt.Println(err)
			return
		}
	}
	fmt.Println(ch.Flush(ctx), ch.Status().Published)
	fmt.Println(ch.Listen(ctx))
	// Output:
	// <nil> 1000
	// line 0 <nil>
}

// Detach leaves a channel without closing it for the others. A handle from New
// attaches at the first Listen; one that only publishes never does.
func ExampleChannel_Detach() {
	ctx := context.Background()
	b := memory.New()
	defer b.Close()
	stays, err := dchannel.Open(ctx, "news", b)
	if err != nil {
		fmt.Println(err)
		return
	}
	leaves := dchannel.New("news", b)
	if err := leaves.Publish(ctx, "I was here"); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(leaves.Status().Attached, leaves.Detach())
	_, err = leaves.Listen(ctx)
	fmt.Println(errors.Is(err, dchannel.ErrDetached))
	fmt.Println(stays.Listen(ctx))
	fmt.Println(stays.IsClosed())
	// Output:
	// false <nil>
	// true
	// I was here <nil>
	// false
}

// The memory backend has switches for faults, to see how code that uses a channel
// takes them. Here the server forgets everything, as one without persistence does
// when it is restarted: nobody can know how much was lost, so the count is 0.
func Example_faults() {
	ctx := context.Background()
	server := memory.NewStore()
	here, there := server.Backend(), server.Backend()
	defer here.Close()
	defer there.Close()
	listener, err := dchannel.Open(ctx, "state", there)
	if err != nil {
		fmt.Println(err)
		return
	}
	publisher := dchannel.New("state", here)
	send := func(msg string) {
		if err := publisher.Publish(ctx, msg); err != nil {
			fmt.Println(err)
		}
	}

	send("before")
	fmt.Println(listener.Listen(ctx))
	server.LoseState()
	_, err = listener.Listen(ctx)
	var lost *dchannel.LostError
	fmt.Println(errors.As(err, &lost), lost.Count)
	send("after")
	fmt.Println(listener.Listen(ctx))

	here.LoseReplies(1) // the next publish happens, and its reply is lost
	send("once")
	fmt.Println(listener.Listen(ctx))
	fmt.Println(publisher.Close())
	_, err = listener.Listen(ctx)
	fmt.Println(errors.Is(err, dchannel.ErrChanClosed))
	// Output:
	// before <nil>
	// true 0
	// after <nil>
	// once <nil>
	// <nil>
	// true
}
